"""Generates answers: in batches for rows, or as a stream for a chat."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.cli.arguments import GENERATION, CommonArguments
from utils.loading.cache_names import cache_of, named_cache
from utils.loading.image_processors import Images
from utils.loading.layers import ATTENDING
from utils.loading.opening import check_embedded

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from utils.encode.encoder import Encoder
    from utils.formats.conversation import Row


# Flags that have an effect only with --do_sample true.
_SAMPLING = ('temperature', 'top_k', 'top_p')
# An unfinished character at the end of a text has at most this many bytes. Each byte may be decoded as U+FFFD.
_UNFINISHED = 3


def generation_config(
    args: CommonArguments, tokenizer: Any, stop_ids: Sequence[int], base: GenerationConfig | None = None
) -> GenerationConfig:
    """Return the generation settings for the flags in `args`.

    Sampling settings are set only if sampling is on, because transformers requires this. Generation stops at the eos
    token of the tokenizer, at `stop_ids`, and at the stop tokens in `base`, the generation settings of the base model.
    """
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {}
    if args.do_sample:
        sampling = {'temperature': args.temperature, 'top_k': args.top_k, 'top_p': args.top_p}
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=sorted({tokenizer.eos_token_id, *stop_ids, *_stop_ids(base)}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )


def _stop_ids(config: GenerationConfig | None) -> list[int]:
    found = config.eos_token_id if config is not None else None
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def served_config(
    base: GenerationConfig, config: GenerationConfig, args: CommonArguments, typed: Collection[str]
) -> GenerationConfig:
    """Return the generation settings to store in a merged model folder.

    They are the settings of the base model (`base`), but the stop, padding and bos tokens come from `config`. A
    generation flag that was typed, for example --temperature, replaces the setting of the base model. So does a flag
    whose value in `args` is not the default. `typed` has the names of the typed flags.

    Sampling is switched on if one of --temperature, --top_k and --top_p replaces a setting, unless --do_sample was
    typed or is not the default. If sampling is off, these three settings are None. If the base model limits no length,
    max_new_tokens is set.
    """
    served = copy.deepcopy(base)
    served.eos_token_id = config.eos_token_id
    served.pad_token_id = config.pad_token_id
    served.bos_token_id = config.bos_token_id

    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    chosen = [name for name in GENERATION if name in typed or getattr(args, name) != defaults[name]]
    for name in chosen:
        setattr(served, name, getattr(args, name))
    if set(chosen) & set(_SAMPLING) and 'do_sample' not in chosen:
        served.do_sample = True
    if served.max_new_tokens is None and served.max_length is None:
        served.max_new_tokens = args.max_new_tokens  # otherwise generate() stops after 20 tokens
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
    """Return the generated ids for each prompt, up to but not including the first stop token.

    An empty prompt starts from the bos token. Whenever at least half of the rows of the batch have ended, the ended
    rows are removed from the batch, and the remaining rows continue with their key-value caches. If the batch has
    images, or if the model keeps other state than keys and values, no row is removed early. `pixels` has the model's
    inputs for the images of all prompts, in the order of the prompts. Raises ConfigError if a token id of a prompt is
    not in the model's embedding.
    """
    import torch

    for prompt in prompts:
        check_embedded(model.config.get_text_config().vocab_size, prompt, 'a prompt')
    start = config.bos_token_id if config.bos_token_id is not None else config.pad_token_id
    inputs = _left_pad([ids or [start] for ids in prompts], config.pad_token_id, model.device)
    ids = inputs['input_ids']
    mask = inputs['attention_mask']
    shown = {**pixels, **images.per_token(ids)} if images is not None and pixels else {}
    prompt_width = ids.shape[1]
    last_width = prompt_width + config.max_new_tokens

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # for each row of the batch, the index of its prompt
    cache: dict[str, Any] = {}
    leaves = len(prompts) > 1 and not shown and _rows_can_leave(model)
    while rows:
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                **shown,
                generation_config=_up_to(config, last_width - ids.shape[1]),
                **({'stopping_criteria': [_half_have_ended(config)]} if leaves else {}),
                **cache,
            )

        going = []
        for index, sequence in enumerate(output.sequences):
            new = sequence[prompt_width:].tolist()
            answer = _cut_at_stop(new, config.eos_token_id)
            answers[rows[index]] = answer
            if len(answer) == len(new):
                going.append(index)
        if output.sequences.shape[1] == last_width or not going:
            break

        chosen = torch.tensor(going, device=ids.device)
        cache = named_cache(output)
        cache_of(cache).batch_select_indices(chosen)
        made = output.sequences.shape[1] - ids.shape[1]
        mask = torch.nn.functional.pad(mask[chosen], (0, made), value=1)
        ids = output.sequences[chosen]
        rows = [rows[index] for index in going]
    return answers


def _rows_can_leave(model: Any) -> bool:
    """Return whether rows can be removed from a batch during generation.

    They can be removed if the model keeps no state for the rows except keys and values.
    """
    settings = model.config.get_text_config().to_dict()
    # With dynamic NTK, Qwen also keeps a factor for each row of the first batch.
    return not settings.get('use_dynamic_ntk') and set(settings.get('layer_types') or ()) <= ATTENDING


def _up_to(config: GenerationConfig, tokens: int) -> GenerationConfig:
    limited = copy.copy(config)
    limited.max_new_tokens = tokens
    limited.return_dict_in_generate = True
    return limited


def _half_have_ended(config: GenerationConfig) -> Any:
    """Return a stopping criterion that stops the batch when at least half of its rows have produced a stop token."""
    import torch
    from transformers import StoppingCriteria

    class HalfHaveEnded(StoppingCriteria):
        ended: torch.Tensor | None = None

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            stops = torch.isin(input_ids[:, -1], torch.tensor(config.eos_token_id, device=input_ids.device))
            self.ended = stops if self.ended is None else self.ended | stops
            return (2 * self.ended.sum() >= len(stops)).expand(len(stops))

    return HalfHaveEnded()


def wanted_texts(encoder: Encoder, rows: Sequence[Row], config: GenerationConfig) -> list[str]:
    """Return the expected answer for each row: the text of its last reply.

    A plain reply is returned unchanged. For a reply with tool calls or reasoning, the trained token ids are decoded. So
    this reply is returned as the template renders it.

    A row of plain text has no reply. The model gets the beginning of the text. The expected answer is the rest of the
    text, cut to max_new_tokens tokens.
    """
    whole = copy.copy(encoder)
    whole.max_length = -1
    texts = []
    for row in rows:
        last = row.messages[-1]
        if row.is_text:
            encoded = whole.encode([row])[0]
            ids = encoded.input_ids[encoded.prompt_length :][: config.max_new_tokens]
            texts.append(str(encoder.tokenizer.decode(ids, skip_special_tokens=True)))
            continue
        if not set(last) & {'tool_calls', 'reasoning'}:
            texts.append(last['content'])
            continue

        encoded = whole.encode([row])[0]
        ids = encoded.input_ids[slice(*encoded.trained)]
        texts.append(str(encoder.tokenizer.decode(_cut_at_stop(ids, config.eos_token_id), skip_special_tokens=True)))
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
    """Return the generated ids for each prompt, in the order of the prompts. Prompts of similar length share a batch.

    `paths` has the image paths of each prompt. The images of a batch are opened when the batch starts. `progress` is
    called after each batch with the number of answered prompts.
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
    """Return the model's inputs for these images, on `device`. Without images, return an empty dictionary."""
    found = images.pixels(paths) if images is not None and paths else {}
    return {name: tensor.to(device) for name, tensor in found.items()}


class _TextStream:
    """A streamer for generate(). It calls `say` with new text as soon as no later id can change this text.

    For each new id, all ids so far are decoded again. Decoding only the new id would lose the space before its text,
    because some tokenizers (Llama 2) strip the first space of a text.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], say: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.say = say
        self.ids: list[int] = []
        self.shown = ''
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """Receive new ids from generate(), and call `say` with their text.

        Text that later ids can still change is kept until a later call. The first call is ignored, because it
        brings the ids of the prompt.
        """
        if self._has_prompt:
            self.ids += value.reshape(-1).tolist()
            self._show(self._settled(self.text()))
        self._has_prompt = True

    def end(self) -> None:
        """Call `say` with the rest of the text. generate() calls this method after the last id."""
        text = self.text()
        differing = (index for index, (one, other) in enumerate(zip(text, self.shown, strict=False)) if one != other)
        # Some decoders change earlier text if invalid bytes follow this text.
        self.shown = self.shown[: next(differing, len(self.shown))]
        self._show(text)

    def text(self) -> str:
        """Return the text so far, without the stop token."""
        return str(self.tokenizer.decode(_cut_at_stop(self.ids, self.stop_ids), skip_special_tokens=True))

    def _settled(self, text: str) -> str:
        """Return the part of the text that later ids cannot change.

        An incomplete character at the end is left out. If the tokenizer cleans up spaces, the last word is left out
        too, because a later id can change the space before the word.
        """
        unfinished = min(len(text) - len(text.rstrip('\ufffd')), _UNFINISHED)
        text = text[: len(text) - unfinished]
        if not self.tokenizer.clean_up_tokenization_spaces:
            return text
        words = text.split()
        return text[: len(text.rstrip()) - len(words[-1])].rstrip() if words else ''

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            new = text[len(self.shown) :]
            self.shown = text
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
    """Return the answer to one prompt, and call `say` with each new piece of its text. Ctrl-C ends the answer early.

    Raises ConfigError if a token id of the prompt is not in the model's embedding.
    """
    import torch

    check_embedded(model.config.get_text_config().vocab_size, prompt, 'this line')
    stream = _TextStream(tokenizer, config.eos_token_id, say)
    inputs = _left_pad([prompt], config.pad_token_id, model.device)
    if images is not None and paths:
        inputs |= {**read_pixels(images, paths, model.device), **images.per_token(inputs['input_ids'])}
    try:
        with torch.no_grad():
            model.generate(**inputs, generation_config=config, streamer=stream)
    except KeyboardInterrupt:
        say(' [stopped]')
        return stream.shown
    return stream.text()
