"""Compares two answers to one row: the answer of a server, and the answer of a model on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from utils.serve.client import Reply
from utils.serve.expected import Model, Next
from utils.serve.request import Question

# Two tokens are equally likely up to rounding if their log probabilities differ by at most this number, and so are two
# log probabilities of one token. The number depends on the dtype of the computation here. Merging rounds too: with
# SmolLM2 in bf16, a merged folder and base + adapter chose different tokens that were 0.62 apart.
ROUNDING = {'float32': 0.05, 'bfloat16': 1.0, 'float16': 0.25}
# Log probabilities below this number are not compared: rounding changes them most.
_UNLIKELY = -5.0
# The number of token ids that are shown where two prompts differ.
_SHOWN_IDS = 4


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, the reply of the server, and the token ids into which the server converts the prompt.

    `served_ids` is None if the server does not give these ids.
    """

    question: Question
    reply: Reply
    served_ids: list[int] | None


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A model, and the ids of its answer to one question. `limit` is the maximum number of tokens of an answer."""

    model: Model
    ids: list[int]
    limit: int

    @property
    def text(self) -> str:
        """Return the answer as text."""
        return self.model.text(self.ids)

    @property
    def ended(self) -> bool:
        """Return whether the model ended the answer itself, before the maximum number of tokens."""
        return len(self.ids) < self.limit


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The result of comparing an answer of the server with an answer of a model on this machine.

    `kind` is 'rounding' if the answers differ, but only because two tokens are almost equally likely.
    """

    kind: Literal['equal', 'rounding', 'different']
    # The number of the first different token, counted from 1, or 0 if the answers are equal. If the server removed the
    # reasoning from its answer, the answers are compared as a whole. The number is then always 1.
    at: int = 0
    # The two answers from token `at` on, or '' if `at` is 0.
    model_rest: str = ''
    server_rest: str = ''
    # The log probability of the model's most likely token minus the log probability of the server's token. None if the
    # server's token is not among the model's likely tokens, or if no token was compared.
    gap: float | None = None

    @property
    def holds(self) -> bool:
        """Return whether the answers are equal up to rounding."""
        return self.kind != 'different'


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The comparison of the server's answer to one row with the answer of the run's model.

    If the run has an adapter, the server's answer is also compared with the answer of the base model. Otherwise all
    fields with `base` in their names are None.
    """

    asked: Asked
    # The answer of the run's model.
    answer: Expected
    base_answer: Expected | None
    # How the server's answer agrees with `answer`. None if the server removed tool calls from its answer.
    agreement: Agreement | None
    # How the server's answer agrees with `base_answer`. Also None if `agreement` is None, or if it is 'equal'.
    base_agreement: Agreement | None
    # 'early' if the server ended its answer, and `answer` goes on there. 'late' if the server goes on after the end of
    # `answer`. Otherwise None. Also None if the answers differ only by rounding, or if the server removed reasoning.
    stops: Literal['early', 'late'] | None
    # The server lists log probabilities of candidates for the first token. This is their largest difference from the
    # log probabilities in the run's model (`first`) and in the base model (`first_base`). Only candidates that are
    # likely in the model count. None if there is no such candidate.
    first: float | None
    first_base: float | None

    @property
    def origin(self) -> str:
        """Return the location of the row."""
        return self.asked.question.row.origin

    @property
    def ids(self) -> list[int]:
        """Return the ids of the prompt of the run."""
        return self.asked.question.ids

    @property
    def served_ids(self) -> list[int] | None:
        """Return the token ids of the prompt on the server, or None if they are unknown or the prompt has images."""
        # An image is one id on some servers, and many on others.
        return None if self.asked.question.paths else self.asked.served_ids

    @property
    def reply(self) -> Reply:
        """Return the stored reply of the server. No request is sent."""
        return self.asked.reply

    @property
    def base_differs(self) -> bool:
        """Return whether the run and its base answer this row differently, apart from white space at the ends.

        Returns False without an adapter.
        """
        return self.base_answer is not None and self.base_answer.text.strip() != self.answer.text.strip()

    @property
    def answered_by(self) -> Literal['run', 'base'] | None:
        """Return 'run' or 'base', whichever gives the same answer as the server. Returns None if neither does.

        An equal answer is preferred to an answer that is equal up to rounding. If run and base match the server
        equally well, the result is 'run'.
        """
        for kind in ('equal', 'rounding'):
            if self.agreement is not None and self.agreement.kind == kind:
                return 'run'
            if self.base_agreement is not None and self.base_agreement.kind == kind:
                return 'base'
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON data for the file with the findings."""
        base = None if self.base_answer is None else self.base_answer.text
        made: dict[str, Any] = {
            'origin': self.origin,
            'prompt_tokens': {'run': len(self.ids), 'server': self.reply.prompt_tokens},
            'prompt_ids_equal': None if self.served_ids is None else self.served_ids == self.ids,
            'answers': {'run': self.answer.text, 'base': base, 'server': self.reply.text},
            'answers_agree': 'not compared' if self.agreement is None else self.agreement.kind,
            'first_logprob_difference': {'run': self.first, 'base': self.first_base},
            'stops': self.stops,
        }
        if self.agreement is not None and self.agreement.kind != 'equal':
            made['first_difference'] = {
                'token': self.agreement.at,
                'run': self.agreement.model_rest,
                'server': self.agreement.server_rest,
                'gap': self.agreement.gap,
            }
        return made


def check_row(asked: Asked, answer: Expected, base_answer: Expected | None, *, rounding: float) -> Checked:
    """Compare the server's answer to one row with `answer`, the answer of the run's model.

    `base_answer` is the answer of the base model, or None if the run has no adapter. `rounding` is the largest
    difference of two log probabilities that still counts as rounding.
    """
    question, reply = asked.question, asked.reply
    own = agree(question, reply, answer, rounding=rounding)
    base = None
    if base_answer is not None and own is not None and own.kind != 'equal':
        base = agree(question, reply, base_answer, rounding=rounding)
    return Checked(
        asked=asked,
        answer=answer,
        base_answer=base_answer,
        agreement=own,
        base_agreement=base,
        stops=_stops(reply, answer, own),
        first=_first_token_difference(reply.first, answer.model, question),
        first_base=(None if base_answer is None else _first_token_difference(reply.first, base_answer.model, question)),
    )


def agree(question: Question, reply: Reply, expected: Expected, *, rounding: float) -> Agreement | None:
    """Compare `reply`, the answer of the server, with `expected`, the answer of a model. Returns the agreement.

    White space at the ends of an answer is not counted as a difference if the server or the decoding removed it.

    Some servers send the reasoning separately from the text of the answer. For such a reply, the answers are equal if
    the model's answer contains the reasoning and ends with the text.

    Returns None if the server removed tool calls from its answer.

    `rounding` is the largest difference of two log probabilities that still counts as rounding.
    """
    if reply.has_calls:
        return None
    answer = expected.text
    if reply.reasoning:
        thought, said = reply.reasoning.strip(), reply.text.strip()
        is_same = thought in answer and answer.strip().endswith(said)
        kind: Literal['equal', 'different'] = 'equal' if is_same else 'different'
        return Agreement(kind=kind, at=1, model_rest=answer, server_rest=f'{thought}\n{said}')
    served = reply.text
    if expected.model.lost_blank(expected.ids):
        served = served.removeprefix(' ')
    if served in (answer, answer.strip()):
        return Agreement(kind='equal')

    common = _common(expected, served)
    begun = expected.model.text(expected.ids[:common])
    rest = served[len(begun) :]
    after = expected.model.next_token(question, expected.ids[:common], penalises=True)
    gap = _gap(after, rest, is_cut=not rest and reply.finish == 'length')
    return Agreement(
        kind='rounding' if gap is not None and gap <= rounding else 'different',
        at=common + 1,
        model_rest=answer[len(begun) :],
        server_rest=rest,
        gap=gap,
    )


def _common(expected: Expected, served: str) -> int:
    """Return how many ids at the start of the model's answer agree with `served`, the text of the server's answer."""
    counts = range(len(expected.ids), 0, -1)
    return next((count for count in counts if served.startswith(expected.model.text(expected.ids[:count]))), 0)


def _gap(after: Next, rest: str, *, is_cut: bool) -> float | None:
    """Return the model's log probability of its likeliest token minus its log probability of the server's token.

    `after` is the model's prediction. The server's token is the first token of `rest`, or the end of turn if `rest` is
    empty. Returns None if the server's token is not among the likely tokens in `after`. Also returns None if `is_cut`
    is True, which means that the answer ended at the maximum number of tokens.
    """
    chosen = None if is_cut else after.log_probability(rest)
    if chosen is None:
        return None
    return max(0.0, max(*after.likely.values(), after.stop) - chosen)


def _stops(reply: Reply, answer: Expected, agreement: Agreement | None) -> Literal['early', 'late'] | None:
    """Return 'early' if the server's answer is too short, and 'late' if it is too long.

    An answer is too short if the server ended it, and the run's answer goes on there. It is too long if it goes on
    after the end of the run's answer. In all other cases, returns None. Also returns None if the answers differ only by
    rounding, or if the server removed the reasoning from its answer.
    """
    if agreement is None or agreement.kind == 'rounding' or reply.reasoning:
        return None
    if agreement.kind == 'equal':
        # Text after the end of turn may consist of special tokens, which are not shown.
        goes_on = answer.ended and reply.new_tokens is not None and reply.new_tokens > len(answer.ids) + 1
        return 'late' if goes_on else None
    if answer.ended and not agreement.model_rest:
        return 'late'
    return 'early' if not agreement.server_rest and reply.finish != 'length' else None


def _first_token_difference(served: Mapping[str, float], model: Model, question: Question) -> float | None:
    """Return the largest difference between server and model in the log probabilities of an answer's first token.

    `served` is a dict from candidates for this token to their log probabilities on the server. Only candidates that are
    likely in the model are compared. Returns None if no candidate is likely in the model.
    """
    if not served:
        return None
    here = model.next_token(question).likely
    shared = [abs(value - here[token]) for token, value in served.items() if here.get(token, -math.inf) > _UNLIKELY]
    return max(shared, default=None)


def first_different(run: Sequence[int], served: Sequence[int], model: Model) -> tuple[int, str, str]:
    """Return where two prompts first differ: (number of the token, text in `run`, text in `served`).

    `run` and `served` are the token ids of the prompts. The number counts from 1. Both texts begin at the different
    token and have up to _SHOWN_IDS tokens.
    """
    pairs = zip(run, served, strict=False)
    at = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(run), len(served)))
    texts = [str(model.tokenizer.decode(list(ids[at : at + _SHOWN_IDS]))) for ids in (run, served)]
    return at + 1, texts[0], texts[1]
