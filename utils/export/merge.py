"""Merges an adapter into its base model.

The merged model is written to a hidden folder, opened again and compared with base + adapter. If the
logits agree, the folder is renamed.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.base.names import SFT_ARGS
from utils.encode.encoder import Encoder
from utils.encode.jinja import serving_template
from utils.encode.template_encoder import TemplateEncoder
from utils.formats.conversation import Row
from utils.loading.image_processors import Images
from utils.loading.save import save_whole
from utils.model import load_model, load_tokenizer
from utils.proofs.template import probes
from utils.run.record import ANSWERS_JSON, RunRecord, record_proof

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

# The largest allowed difference between the logits of the merged model and of base + adapter, as a fraction of the
# largest logit. Merging rounds the weights once more. In bf16, rounding has a large effect: on SmolLM2, the logits of
# the same weights in fp32 and in bf16 differed by up to 5 %.
_BOUND = {'float32': 1e-3, 'bfloat16': 1e-1, 'float16': 1e-2}
# The largest allowed difference between the logits of the reopened model and of the merged model in memory, also as a
# fraction of the largest logit. It is small because both have the same weights and use the same kernels.
_SAME = 1e-5
# Limits for the share of the adapter's effect on the logits that remains after merging. Below _LOST merging fails.
# Below _WHOLE the outcome in proofs.json says that rounding removed a part of the effect.
_LOST = 0.05
_WHOLE = 0.9
_TEXT = 'The quick brown fox counts: 1, 2, 3, 10, 100. 敏捷的棕色狐狸。\n\ndef f(x):\n    return x ** 2\n'


def probe_logits(
    model: Any, tokenizer: Any, images: Images | None = None, *, ids: list[int] | None = None
) -> torch.Tensor:
    """Run the model on the token ids `ids`, and return its logits (1, T, V) in fp32 on the CPU.

    If `ids` is None, the input is a fixed text. For a vision model, an example image precedes this text.
    """
    import torch

    # Stay within the trained length. For longer inputs some models scale their rotary embedding (Qwen's dynamic NTK),
    # which the plain classes do not do.
    limit = getattr(model.config, 'max_position_embeddings', 1024)  # Bloom uses ALiBi and has no such limit
    if ids is None and images is not None:
        inputs = images.example(tokenizer, tokenizer(_TEXT, add_special_tokens=False)['input_ids'][:limit])
    else:
        ids = tokenizer(_TEXT, add_special_tokens=False)['input_ids'] if ids is None else ids
        inputs = {'input_ids': torch.tensor([ids[:limit]])}

    with torch.no_grad():
        logits: torch.Tensor = model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False).logits
    return logits.float().cpu()


def user_rows(run_dir: Path) -> list[Row]:
    """Return the rows for which the run generated answers for its report. Without answers.json the list is empty."""
    file = run_dir / ANSWERS_JSON
    answers = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else []
    return [
        Row(messages=a['messages'], is_text='beginning' in a, tools=a['tools'], origin=f'{file}:{n}')
        for n, a in enumerate(answers, 1)
    ]


def _cutting(encoder: Encoder) -> Encoder:
    """Return a copy of the encoder that cuts rows longer than --max_length. The comparison does not need whole rows."""
    made = copy.copy(encoder)
    made.overlong = 'cut'
    return made


def merge_checkpoint(
    model: Any,
    encoder: Encoder,
    config: GenerationConfig,
    checkpoint: Path,
    *,
    record: RunRecord,
    images: Images | None = None,
) -> tuple[Path, str]:
    """Merge the adapter of a checkpoint, and write the merged model to the folder <checkpoint>-merged.

    Returns this folder, and a text that says what was proven and how to serve the model. Raises ConfigError if the
    merged model differs too much from base + adapter.
    """
    started = time.perf_counter()
    if checkpoint.name in ('', '..'):  # with_name fails for '' and gives a wrong folder for '..'
        checkpoint = checkpoint.resolve()
    target = checkpoint.with_name(f'{checkpoint.name}-merged')
    run_dir = checkpoint.parent
    rows = user_rows(run_dir)
    encoder.tokenizer.chat_template, template_note = serving_template(encoder, [*rows, *probes()])

    outcome: dict[str, Any] = {'passed': False}
    try:
        texts = [encoded.input_ids for encoded in _cutting(encoder).encode(rows)]
        proven = merge_and_save(
            model, encoder.tokenizer, target, record=record, images=images, texts=texts, config=config
        )
        outcome = {'passed': True, 'says': f'reopened from disk, {target.name} has {proven}; {template_note}'}
    except ConfigError as error:
        outcome['says'] = error.problems[0]
        raise
    finally:
        if (run_dir / SFT_ARGS).is_file():
            record_proof(run_dir, 'merge', {**outcome, 'seconds': round(time.perf_counter() - started, 2)})

    serves = f'serve it: transformers serve {target}\n      or: vllm serve {target}'
    if encoder.asks_to_think:
        serves += f'\nask it with {encoder.switch} (chat_template_kwargs): its replies were trained with it'
    if isinstance(encoder, TemplateEncoder) and not encoder.tokenizer.chat_template:
        serves = 'serve it with llm_infer.py: no other program knows its template'
    return target, f'{outcome["says"]}\n{serves}'


def merge_and_save(
    model: Any,
    tokenizer: Any,
    target: Path,
    *,
    record: RunRecord,
    images: Images | None = None,
    texts: Sequence[list[int]] = (),
    config: GenerationConfig | None = None,
) -> str:
    """Merge the adapter, save the whole model in the folder `target`, and return a text that says what was compared.

    The saved model is opened again. Its logits are compared with the logits of base + adapter, on a fixed text, on the
    tokens that the run added and on the token ids `texts`. If they differ by more than rounding explains, raises
    ConfigError and leaves `target` as it was.
    """
    _recover(target)
    new = list(record.added_tokens)
    probed = [None, *texts, *([tokenizer.convert_tokens_to_ids(new)] if new else [])]
    wanted = [probe_logits(model, tokenizer, images, ids=ids) for ids in probed]
    with model.disable_adapter():
        bare = [probe_logits(model, tokenizer, images, ids=ids) for ids in probed]
    merged = model.merge_and_unload(safe_merge=True)
    made = [probe_logits(merged, tokenizer, images, ids=ids) for ids in probed]
    share = min(map(_share_of_adapter, bare, wanted, made))

    merged.generation_config = config or merged.generation_config
    unchecked = target.with_name(f'.{target.name}.aside')
    shutil.rmtree(unchecked, ignore_errors=True)
    save_whole(merged, tokenizer, unchecked, images)
    record.with_flags(sft_type='full').write(unchecked)

    difference, fault = verify_merged(unchecked, merged, tokenizer, probed, wanted, made, images)
    if share < _LOST:
        fault = (
            f'the merged model keeps {share:.0%} of what the adapter does: the rest was rounded away. '
            'Merge with --dtype fp32.'
        )
    if fault:
        raise ConfigError(f'{target}: not written: {fault} The rejected folder is {unchecked}.')
    put_in_place(unchecked, target)

    largest = max(float(logits.abs().max()) for logits in wanted)
    head = 'tied' if _is_tied(merged)[0] else 'separate'
    rounded = ''
    if share < _WHOLE:
        rounded = f'; {share:.0%} of what the adapter does: the rest was rounded away, --dtype fp32 keeps it'
    compared = f'a fixed text, the new tokens and {len(texts)}' if new else f'a fixed text and {len(texts)}'
    return (
        f'the logits of base + adapter on {compared} of your rows (largest difference '
        f'{difference:.3g}, largest logit {largest:.3g}), its vocabulary, generation settings and {head} head{rounded}'
    )


def verify_merged(
    folder: Path,
    merged: Any,
    tokenizer: Any,
    texts: Sequence[list[int] | None],
    wanted: Sequence[torch.Tensor],
    merged_logits: Sequence[torch.Tensor],
    images: Images | None = None,
) -> tuple[float, str | None]:
    """Open a merged folder as users open it, and compare the model with the merged model in memory.

    `wanted` are the logits of base + adapter for `texts`, and `merged_logits` those of the merged model in memory.
    In `texts`, None is the fixed text of `probe_logits`.

    Returns the largest difference of the opened model's logits from `wanted`, and a text that describes the first
    problem, or None if there is no problem.
    """
    dtype = next(merged.parameters()).dtype
    reopened = load_model(folder, torch_dtype=dtype).to(merged.device).eval()
    found_tokenizer = load_tokenizer(folder)

    bound = _BOUND[str(dtype).removeprefix('torch.')]
    difference = 0.0
    kernels = {model.config._attn_implementation for model in (merged, reopened)}
    for ids, logits, made in zip(texts, wanted, merged_logits, strict=True):
        found = probe_logits(reopened, tokenizer, images, ids=ids)
        for what, expected, allowed in (
            ('base + adapter', logits, bound),
            ('what was written', made, _SAME if len(kernels) == 1 else bound),
        ):
            largest = float(expected.abs().max())
            apart = float((expected - found).abs().max())
            if not apart <= allowed * largest:
                return apart, (
                    f'the merged model differs from {what}: its logits by up to {apart:.4g}, rounding explains '
                    f'{allowed * largest:.4g}.'
                )
        difference = max(difference, float((logits - found).abs().max()))

    if found_tokenizer.get_vocab() != tokenizer.get_vocab():
        return difference, 'the merged folder has another vocabulary than the model was trained with.'
    if found_tokenizer.chat_template != tokenizer.chat_template:
        return difference, 'the merged folder has another chat template than the model was trained with.'
    if _settings(reopened) != _settings(merged):
        return difference, 'the merged folder has other generation settings than were written.'
    if _is_tied(reopened) != _is_tied(merged):
        return difference, 'the output head is tied in the model or in the merged folder, but not in both.'
    return difference, None


def _share_of_adapter(bare: torch.Tensor, tuned: torch.Tensor, found: torch.Tensor) -> float:
    """Return which share of the adapter's effect the merged model has: 0 is no effect, 1 is the whole effect.

    `bare` are the logits of the base, `tuned` of the base with the adapter, and `found` of the merged model. Rounding
    errors have random directions, so they hardly change the share. If the effect of the adapter is much smaller than
    the rounding errors, the share cannot be computed, and 1 is returned.
    """
    moved = tuned - bare
    error = found - tuned
    known = float(moved.norm()) > 0.1 * float(error.norm())
    if not known:
        return 1.0
    return float(((found - bare) * moved).sum() / moved.square().sum())


def _settings(model: Any) -> dict[str, Any]:
    names = (
        'eos_token_id', 'pad_token_id', 'bos_token_id', 'do_sample', 'max_new_tokens', 'temperature', 'top_k',
        'top_p', 'repetition_penalty',
    )  # fmt: skip
    return {name: getattr(model.generation_config, name) for name in names}


def _is_tied(model: Any) -> tuple[bool, bool]:
    """Return two booleans: whether output head and embedding share one tensor, and whether the config says so."""
    head = model.get_output_embeddings()
    shared = head is not None and head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    # Some vision models store tie_word_embeddings only for the whole model, not for the language model.
    settings = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    return shared, bool(settings.get('tie_word_embeddings'))


def _replaced(target: Path) -> Path:
    return target.with_name(f'.{target.name}.replaced')


def _recover(target: Path) -> None:
    """Restore the earlier folder `target` if an earlier `put_in_place` was interrupted between its two renames."""
    if not target.exists() and _replaced(target).exists():
        _replaced(target).rename(target)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a complete folder to `target`.

    An existing `target` is first moved aside, and deleted only after the rename. If the rename fails, it is moved back
    and OSError is raised.
    """
    earlier = _replaced(target)
    if target.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        target.rename(earlier)
    try:
        folder.rename(target)
    except OSError:
        _recover(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
