"""Answers: in batches for rows, streamed for people."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.cli.arguments import GENERATION, CommonArguments
from utils.loading.image_processors import Images
from utils.loading.layers import ATTENDING
from utils.loading.opening import check_embedded

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from utils.encode.encoder import Encoder
    from utils.formats.conversation import Row


# The flags that count where answers are sampled alone.
_SAMPLING = ('temperature', 'top_k', 'top_p')
# Bytes of a character that may have come without its last one, each shown as U+FFFD.
_UNFINISHED = 3


def generation_config(
    args: CommonArguments, tokenizer: Any, stop_ids: Sequence[int], base: GenerationConfig | None = None
) -> GenerationConfig:
    """Return the settings of the command line; sampling fields only where sampling is on, as transformers demands.

    Answers stop at the ends of the tokenizer, of the template and of the base model's own settings.
    """
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {}
    if args.do_sample:
        sampling = {'temperature': args.temperature, 'top_k': args.top_k, 'top_p': args.top_p}
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=sorted({tokenizer.eos_token_id, *stop_ids, *_ends(base)}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )


def _ends(config: GenerationConfig | None) -> list[int]:
    found = config.eos_token_id if config is not None else None
    return found if isinstance(found, list) else [] if found is None else [found]


def served_config(
    base: GenerationConfig, config: GenerationConfig, args: CommonArguments, typed: Collection[str]
) -> GenerationConfig:
    """Return what a merged folder is served with: the base model's settings, with the ends and padding of `config`.

    Settings that were typed go before the base's: now, or for the training run, where they differ from the default.
    """
    served = copy.deepcopy(base)
    served.eos_token_id, served.pad_token_id, served.bos_token_id = (
        config.eos_token_id,
        config.pad_token_id,
        config.bos_token_id,
    )
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    chosen = [name for name in GENERATION if name in typed or getattr(args, name) != defaults[name]]
    for name in chosen:
        setattr(served, name, getattr(args, name))
    if set(chosen) & set(_SAMPLING) and 'do_sample' not in chosen:
        served.do_sample = True
    if served.max_new_tokens is None and served.max_length is None:
        served.max_new_tokens = args.max_new_tokens  # else generate() stops after 20
    if not served.do_sample:
        for name in _SAMPLING:
            setattr(served, name, None)
    return served


def _left_pad(prompts: Sequence[list[int]], pad_token_id: int, device: Any) -> dict[str, Any]:
    import torch

    width = max(len(ids) for ids in prompts)
    padded = [[pad_token_id] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return {'input_ids': torch.tensor(padded, device=device), 'attention_mask': torch.tensor(mask, device=device)}


def _cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def generate_batch(
    model: Any,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    images: Images | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the new ids of each prompt without the stop token and what follows it. An empty prompt starts from bos.

    Each time half of the rows have ended, those leave the batch and the others go on from their caches; not with
    images. `pixels` is what the model takes for the prompts' images, prompt by prompt.
    """
    import torch

    for prompt in prompts:
        check_embedded(model.config.get_text_config().vocab_size, prompt, 'a prompt')
    start = config.bos_token_id if config.bos_token_id is not None else config.pad_token_id
    inputs = _left_pad([ids or [start] for ids in prompts], config.pad_token_id, model.device)
    ids, mask = inputs['input_ids'], inputs['attention_mask']
    seen = {**pixels, **images.per_token(ids)} if images is not None and pixels else {}
    width, last = ids.shape[1], ids.shape[1] + config.max_new_tokens
    answers: list[list[int]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), None
    leaves = len(prompts) > 1 and not seen and _rows_can_leave(model)
    while rows:
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                **seen,
                generation_config=_up_to(config, last - ids.shape[1]),
                **({'stopping_criteria': [_half_have_ended(config)]} if leaves else {}),
                **({'past_key_values': cache} if cache is not None else {}),
            )
        new = [row[width:].tolist() for row in output.sequences]
        for row, found in zip(rows, new, strict=True):
            answers[row] = _cut_at_stop(found, config.eos_token_id)
        going = [place for place, found in enumerate(new) if len(answers[rows[place]]) == len(found)]
        if output.sequences.shape[1] == last or not going:
            break
        chosen, cache = torch.tensor(going, device=ids.device), output.past_key_values
        cache.batch_select_indices(chosen)
        made = output.sequences.shape[1] - ids.shape[1]
        mask = torch.nn.functional.pad(mask[chosen], (0, made), value=1)
        ids, rows = output.sequences[chosen], [rows[place] for place in going]
    return answers


def _rows_can_leave(model: Any) -> bool:
    """Return whether all that a model keeps of its rows lies in caches of keys and values."""
    settings = model.config.get_text_config().to_dict()
    # Qwen's dynamic NTK keeps a factor for each row of the batch it was started with.
    return not settings.get('use_dynamic_ntk') and set(settings.get('layer_types') or ()) <= ATTENDING


def _up_to(config: GenerationConfig, tokens: int) -> GenerationConfig:
    limited = copy.copy(config)
    limited.max_new_tokens = tokens
    limited.return_dict_in_generate = True
    return limited


def _half_have_ended(config: GenerationConfig) -> Any:
    """Return a stopping rule: half of the rows, or more, have produced a stop token since it was made."""
    import torch
    from transformers import StoppingCriteria

    class HalfHaveEnded(StoppingCriteria):
        ended: torch.Tensor | None = None

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            stops = torch.isin(input_ids[:, -1], torch.tensor(config.eos_token_id, device=input_ids.device))
            self.ended = stops if self.ended is None else self.ended | stops
            return (2 * self.ended.sum() >= len(stops)).expand(len(stops))

    return HalfHaveEnded()


def wanted_texts(encoder: Encoder, rows: Sequence[Row], stop_ids: Sequence[int]) -> list[str]:
    """Return the text that each row's last reply is trained as, to hold answers against.

    What the template makes of tool calls or of reasoning is decoded from the trained ids; plain text is taken as it is.
    """
    whole = copy.copy(encoder)
    whole.max_length = -1
    texts = []
    for row in rows:
        last = row.messages[-1]
        if not set(last) & {'tool_calls', 'reasoning'}:
            texts.append(last['content'])
            continue
        encoded = whole.encode([row])[0]
        ids = encoded.input_ids[slice(*encoded.trained)]
        texts.append(str(encoder.tokenizer.decode(_cut_at_stop(ids, stop_ids), skip_special_tokens=True)))
    return texts


def generate_rows(
    model: Any,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    images: Images | None = None,
    paths: Sequence[Sequence[str]] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Return the new ids of each prompt, in the order given; batches are of like length, so that little is padded.

    `paths` names the images of each prompt; files are opened batch by batch.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        shown = [path for i in chosen for path in paths[i]] if paths else []
        pixels = read_pixels(images, shown, model.device)
        batch = generate_batch(model, [prompts[i] for i in chosen], config, images=images, pixels=pixels)
        for index, ids in zip(chosen, batch, strict=True):
            answers[index] = ids
        progress(min(start + batch_size, len(order)))
    return answers


def read_pixels(images: Images | None, paths: Sequence[str], device: Any) -> dict[str, Any]:
    """Return what the model takes for these images, on its device; nothing without images."""
    found = images.pixels(paths) if images is not None and paths else {}
    return {name: tensor.to(device) for name, tensor in found.items()}


class _Spoken:
    """The text of ids that come one by one, handed on as far as what follows cannot change it.

    Each time the whole of the ids is decoded: a piece by itself would lose the blank in front of it where a tokenizer
    takes the first blank of a text for its own (Llama 2).
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], say: Callable[[str], None]) -> None:
        self.tokenizer, self.stop_ids, self.say = tokenizer, stop_ids, say
        self.ids: list[int] = []
        self.said = ''
        self._prompt_came = False

    def put(self, value: Any) -> None:
        """Take new ids, as generate() hands them on; those of the prompt come first."""
        if self._prompt_came:
            self.ids += value.reshape(-1).tolist()
            self._hand_on(self._settled(self.text()))
        self._prompt_came = True

    def end(self) -> None:
        """Hand on what was held back."""
        text = self.text()
        same = (index for index, (one, other) in enumerate(zip(text, self.said, strict=False)) if one != other)
        # Some decoders take back text that bytes follow which are none.
        self.said = self.said[: next(same, len(self.said))]
        self._hand_on(text)

    def text(self) -> str:
        """Return the text so far, without the stop token."""
        return str(self.tokenizer.decode(_cut_at_stop(self.ids, self.stop_ids), skip_special_tokens=True))

    def _settled(self, text: str) -> str:
        """Return the text without an unfinished character and without blanks and words that may be moved together."""
        unfinished = min(len(text) - len(text.rstrip('\ufffd')), _UNFINISHED)
        text = text[: len(text) - unfinished]
        if not self.tokenizer.clean_up_tokenization_spaces:
            return text
        return text[: len(text.rstrip()) - len(text.split()[-1])].rstrip() if text.split() else ''

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self.said) and text.startswith(self.said):
            new, self.said = text[len(self.said) :], text
            self.say(new)


def generate_stream(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    config: GenerationConfig,
    say: Callable[[str], None],
    *,
    images: Images | None = None,
    paths: Sequence[str] = (),
) -> str:
    """Return the answer to one prompt, handing text to `say` as it comes; Ctrl-C ends the answer where it stands."""
    import torch

    check_embedded(model.config.get_text_config().vocab_size, prompt, 'this line')
    spoken = _Spoken(tokenizer, config.eos_token_id, say)
    inputs = _left_pad([prompt], config.pad_token_id, model.device)
    if images is not None and paths:
        inputs |= {**read_pixels(images, paths, model.device), **images.per_token(inputs['input_ids'])}
    try:
        with torch.no_grad():
            model.generate(**inputs, generation_config=config, streamer=spoken)
    except KeyboardInterrupt:
        say(' [stopped]')
        return spoken.said
    return spoken.text()
