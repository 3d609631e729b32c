"""Computes on this machine what the server should answer: greedy answers, and log probabilities of the next token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.base.logger import logger
from utils.infer.generation import generate_rows
from utils.loading.image_processors import Images
from utils.serve.request import Question

if TYPE_CHECKING:
    from transformers import GenerationConfig

# The number of most likely tokens among which the token of the server is looked for.
_CANDIDATES = 50


@dataclass(frozen=True, kw_only=True)
class Next:
    """The model's prediction of the next token. `likely` is {token text: log probability} for the most likely tokens.

    Several tokens can end an answer. `stop` is the log probability of the most likely one of them.
    """

    likely: dict[str, float]
    stop: float

    def log_probability(self, text: str) -> float | None:
        """Return the log probability that the model gives to the first token of `text`.

        Every key of `likely` that is a prefix of `text` could be the first token. The result is the highest log
        probability of these keys. If no key is a prefix of `text`, the result is None. If `text` is empty, the result
        is the log probability of the end of the answer.
        """
        if not text:
            return self.stop
        found = [value for token, value in self.likely.items() if _begins(text, token)]
        return max(found, default=None)


def _begins(text: str, token: str) -> bool:
    """Return whether the text begins with the token.

    If the last character of the token is unfinished (U+FFFD), it matches any character beyond ASCII.
    """
    whole = token.rstrip('\ufffd')
    if whole == token:
        return bool(token) and text.startswith(token)
    rest = text[len(whole) :]
    return text.startswith(whole) and rest[:1] > '\x7f'


class Model:
    """A model that answers questions greedily. If `is_base` is True, it answers with its adapter switched off."""

    def __init__(
        self, model: Any, tokenizer: Any, config: GenerationConfig, images: Images | None, *, is_base: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.images = images
        self._off: Callable[[], Any] = model.disable_adapter if is_base else contextlib.nullcontext

    def answers(self, questions: Sequence[Question], *, batch_size: int) -> list[list[int]]:
        """Return the ids of the greedy answers, without the token that ends them."""
        with self._off():
            return generate_rows(
                self.model,
                [question.ids for question in questions],
                self.config,
                batch_size=batch_size,
                images=self.images,
                paths=[question.paths for question in questions],
                progress=lambda done: logger.info(f'computed {done} of {len(questions)} answers'),
            )

    def text(self, ids: Sequence[int]) -> str:
        """Return an answer as text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def lost_blank(self, ids: Sequence[int]) -> bool:
        """Return whether decoding removed the first blank of an answer, as tokenizers of SentencePiece do."""
        return bool(ids) and self._begins_with_blank(ids[0]) and not self.text(ids).startswith(' ')

    def next_token(self, question: Question, begun: Sequence[int] = (), *, penalises: bool = False) -> Next:
        """Return the prediction for the next token. `begun` has the ids of the answer so far.

        With `penalises`, the repetition penalty of the generation settings is applied to the tokens of prompt and
        answer. A server applies this penalty when it chooses a token, but some servers report log probabilities
        without the penalty.
        """
        import torch
        from transformers import RepetitionPenaltyLogitsProcessor

        ids = torch.tensor([[*question.ids, *begun]], device=self.model.device)
        inputs = {'input_ids': ids}
        if self.images is not None:
            shown = self.images.inputs(ids, question.paths)
            inputs |= {name: tensor.to(ids.device) for name, tensor in shown.items()}
        with torch.no_grad(), self._off():
            logits = self.model(**inputs, use_cache=False).logits[0, -1].float()
        penalty = self.config.repetition_penalty
        if penalises and penalty and penalty != 1:
            logits = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None])[0]
        found = torch.log_softmax(logits, dim=-1)

        values, indices = found.topk(min(_CANDIDATES, len(found)))
        likely: dict[str, float] = {}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            likely.setdefault(self._token_text(index), value)
        return Next(likely=likely, stop=float(found[self.config.eos_token_id].max()))

    def _token_text(self, index: int) -> str:
        """Return the text of a token with its leading space, which some tokenizers drop if they decode one token."""
        text = str(self.tokenizer.decode([index]))
        return f' {text}' if self._begins_with_blank(index) and not text.startswith(' ') else text

    def _begins_with_blank(self, index: int) -> bool:
        return str(self.tokenizer.convert_ids_to_tokens(index)).startswith('▁')
