"""Answers: in batches for rows, streamed for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.argument import CommonArguments
from utils.native.image_readers import Images

if TYPE_CHECKING:
    from transformers import GenerationConfig


def generation_config(args: CommonArguments, tokenizer: Any, stop_ids: Sequence[int]) -> GenerationConfig:
    """Return the settings of the command line; sampling fields only where sampling is on, as transformers demands."""
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {}
    if args.do_sample:
        sampling = {'temperature': args.temperature, 'top_k': args.top_k, 'top_p': args.top_p}
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=sorted({tokenizer.eos_token_id, *stop_ids}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )


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

    `pixels` is what the model takes for the prompts' images, prompt by prompt.
    """
    import torch

    start = config.bos_token_id if config.bos_token_id is not None else config.pad_token_id
    filled = [ids or [start] for ids in prompts]
    inputs = _left_pad(filled, config.pad_token_id, model.device)
    if images is not None and pixels:
        inputs |= {**pixels, **images.per_token(inputs['input_ids'])}
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=config)
    width = inputs['input_ids'].shape[1]
    return [_cut_at_stop(row.tolist(), config.eos_token_id) for row in output[:, width:]]


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
    from transformers import TextStreamer

    written: list[str] = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            written.append(text)
            say(text)

    import torch

    inputs = _left_pad([prompt], config.pad_token_id, model.device)
    if images is not None and paths:
        inputs |= {**read_pixels(images, paths, model.device), **images.per_token(inputs['input_ids'])}
    try:
        with torch.no_grad():
            model.generate(
                **inputs,
                generation_config=config,
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
    except KeyboardInterrupt:
        say(' [stopped]')
    return ''.join(written)
