"""Merges an adapter into its base model.

The merged model is written to a hidden folder, loaded again and compared with base + adapter. If the logits agree, the
folder gets its final name.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.base.names import SFT_ARGS
from utils.encode.encoder import Encoder
from utils.encode.jinja import serving_template
from utils.encode.template_encoder import TemplateEncoder
from utils.export.same import MERGE_JSON, carried_files
from utils.export.write import Base, Written, is_tied, write_merged
from utils.formats.conversation import Row
from utils.loading.image_processors import Images
from utils.loading.save import add_end_token
from utils.loading.tensor_ranges import SUFFIX
from utils.model import load_model, load_tokenizer
from utils.proofs.template import probes
from utils.run.read_back import read_run_answers
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
# Limits for the share of the adapter that remains after merging. Below _LOST of its effect on the logits merging fails.
# Below _WHOLE a warning says how much rounding removed. If the files of the base are copied, the share is that of the
# changes of the weights, because it is exact. In bf16 a small effect on the logits cannot be told from the rounding of
# the operations: an adapter of 30 steps on SmolLM2 kept 63 % of its weights, 80 % of its effect on logits in fp32, and
# 98 % by the logits in bf16.
_LOST = 0.05
_WHOLE = 0.95
_TEXT = 'The quick brown fox counts: 1, 2, 3, 10, 100. 敏捷的棕色狐狸。\n\ndef f(x):\n    return x ** 2\n'


def probe_logits(
    model: Any, tokenizer: Any, images: Images | None = None, *, ids: list[int] | None = None
) -> torch.Tensor:
    """Run the model on the token ids `ids`, and return its logits (1, T, V) in fp32 on the CPU.

    If `ids` is None, the input is a fixed text. If `images` is not None, an example image precedes this text. An input
    that is longer than the context of the model is cut.
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
    return [
        Row(
            messages=row['messages'],
            is_text='beginning' in row,
            tools=row.get('tools'),
            origin=f'{run_dir / ANSWERS_JSON}:{number}',
        )
        for number, row in enumerate(read_run_answers(run_dir), 1)
    ]


def _cutting(encoder: Encoder) -> Encoder:
    """Return a copy of the encoder that cuts rows longer than --max_length, whatever --overlong says."""
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
    base: Base | None = None,
) -> tuple[Path, str]:
    """Merge the adapter of a checkpoint, and write the merged model to the folder <checkpoint>-merged.

    Returns this folder, and a text that says what was compared and how to serve the model. Raises ConfigError if the
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
            model, encoder.tokenizer, target, record=record, images=images, texts=texts, config=config, base=base
        )
        facts = [*proven, template_note]
        outcome = {'passed': True, 'says': f'reopened from disk, {target.name}: {"; ".join(facts)}'}
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
    if (target / MERGE_JSON).is_file() and base is not None:
        serves += f'\ncompare it with its base: python -m utils.export.same {target} {base.folder}'
    return target, '\n'.join(['reopened from disk:', *(f'  {fact}' for fact in facts), serves])


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the merged model is compared with when it is loaded again: logits, tied weights, settings and tokenizer.

    `dtype` and `kernel` are the dtype and the attention implementation of base + adapter. They decide how far the
    logits may differ.
    """

    # The token ids on which logits are compared (None is the fixed text), and the logits of base + adapter and of the
    # base alone.
    texts: Sequence[list[int] | None]
    wanted: Sequence[torch.Tensor]
    bare: Sequence[torch.Tensor]
    dtype: torch.dtype
    kernel: str
    tied: tuple[bool, bool]
    settings: Mapping[str, Any]
    tokenizer: Any
    images: Images | None = None


def expect(
    model: Any, tokenizer: Any, texts: Sequence[list[int] | None], settings: GenerationConfig, images: Images | None
) -> Expected:
    """Return what the merged model must match when it is loaded again, computed with the PeftModel `model`.

    Logits are computed for each item of `texts`. An item is a list of token ids, or None for the fixed text of
    `probe_logits`. `settings` are the generation settings of the model.
    """
    wanted = [probe_logits(model, tokenizer, images, ids=ids) for ids in texts]
    with model.disable_adapter():
        bare = [probe_logits(model, tokenizer, images, ids=ids) for ids in texts]

    base = model.get_base_model()
    return Expected(
        texts=texts,
        wanted=wanted,
        bare=bare,
        dtype=base.dtype,
        kernel=base.config._attn_implementation,
        tied=is_tied(base),
        settings=_settings(settings),
        tokenizer=tokenizer,
        images=images,
    )


def merge_and_save(
    model: Any,
    tokenizer: Any,
    target: Path,
    *,
    record: RunRecord,
    images: Images | None = None,
    texts: Sequence[list[int]] = (),
    config: GenerationConfig | None = None,
    base: Base | None = None,
) -> list[str]:
    """Merge the adapter, save the whole model in the folder `target`, and return facts that say what was compared.

    If possible, the files of `base` are copied and only the changed tensors are replaced. Otherwise, or without `base`,
    transformers saves the model. The saved model is loaded again. Its logits are compared with those of base + adapter,
    on a fixed text, on the tokens that the run added, and on the token ids `texts`. If rounding removed a part of the
    adapter, a warning is logged. `model` cannot be used afterwards.

    Raises ConfigError if the logits differ by more than rounding explains, if rounding removed the effect of the
    adapter, or if the tokenizer, generation settings or tied weights are wrong. In these cases `target` is not changed.
    If `target` exists, files in it that merging does not write, such as GGUF files, are kept.
    """
    _recover(target)
    settings = config or model.generation_config
    add_end_token(tokenizer, settings)
    new = list(record.added_tokens)
    probed = [None, *texts, *([tokenizer.convert_tokens_to_ids(new)] if new else [])]
    expected = expect(model, tokenizer, probed, settings, images)
    unchecked = target.with_name(f'.{target.name}.aside')
    shutil.rmtree(unchecked, ignore_errors=True)
    try:
        written = write_merged(
            model,
            unchecked,
            tokenizer=tokenizer,
            images=images,
            settings=settings,
            record=record,
            base=base,
            probe=lambda merged: [probe_logits(merged, tokenizer, images, ids=ids) for ids in expected.texts],
        )
        difference, share, fault = verify_merged(unchecked, expected, written, base)
    except BaseException:
        shutil.rmtree(unchecked, ignore_errors=True)
        raise

    if fault:
        raise ConfigError(f'{target}: not written, because {fault} The rejected model is kept in {unchecked}.')
    put_in_place(unchecked, target)

    largest = max(float(logits.abs().max()) for logits in expected.wanted)
    head = 'tied' if (written.tied or expected.tied)[0] else 'separate'
    compared = f'a fixed text, the new tokens and {len(texts)}' if new else f'a fixed text and {len(texts)}'
    facts = [
        f'its logits differ from those of base + adapter by up to {difference:.3g} on {compared} of your rows; '
        f'rounding explains up to {_bound(expected, written) * largest:.3g} (largest logit {largest:.3g})',
        f'it has their vocabulary, generation settings and {head} head',
    ]
    what = 'its effect on the logits' if written.kept is None else 'the changes that it makes to the weights'
    kept = share if written.kept is None else written.kept
    if kept < _WHOLE:
        facts.append(f'rounding removed a part of the adapter: {kept:.0%} of {what} is kept')
        logger.warning(
            f'{target}: rounding to {" and ".join(sorted(written.dtypes))} removed a part of the adapter: {kept:.0%} '
            f'of {what} is kept. Merge with --dtype fp32, which keeps all of it.'
        )
    return [*facts, written.says]


def verify_merged(
    folder: Path, expected: Expected, written: Written, base: Base | None = None
) -> tuple[float, float, str | None]:
    """Load the model in a merged folder, and compare it with `expected`. Returns (difference, share, fault).

    `difference` is the largest absolute difference between the logits of the merged model and of base + adapter.
    `share` is the smallest share of the adapter's effect that the merged model keeps (see `_share_of_adapter`). `fault`
    describes the first problem, or is None.

    The model is loaded with the function `reopen` of `base`. If `base` is None, `load_model` loads it in the dtype of
    `expected`.
    """
    if base is not None:
        reopened, found_tokenizer = base.reopen(folder)
    else:
        reopened, found_tokenizer = load_model(folder, torch_dtype=expected.dtype), load_tokenizer(folder)
    reopened.eval()

    found = [probe_logits(reopened, expected.tokenizer, expected.images, ids=ids) for ids in expected.texts]
    difference = max(float((one - other).abs().max()) for one, other in zip(found, expected.wanted, strict=True))
    share = min(map(_share_of_adapter, expected.bare, expected.wanted, found))

    bound = _bound(expected, written)
    same = _SAME if reopened.config._attn_implementation == expected.kernel else bound
    fault = _logits_fault(found, expected.wanted, bound, 'base + adapter')
    fault = fault or _logits_fault(found, written.made or found, same, 'the model that was written')
    if fault is None and share < _LOST:
        fault = (
            f'rounding of the merged weights removed the effect of the adapter (remaining: {share:.0%}). Merge with '
            '--dtype fp32, which keeps the effect.'
        )
    return difference, share, fault or _settings_fault(reopened, found_tokenizer, expected, written)


def _bound(expected: Expected, written: Written) -> float:
    """Return the allowed difference of the logits from those of base + adapter, as a fraction of the largest logit."""
    return max(_BOUND[dtype] for dtype in {str(expected.dtype).removeprefix('torch.'), *written.dtypes})


def _logits_fault(
    found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], allowed: float, what: str
) -> str | None:
    """Return a message if logits differ by more than the fraction `allowed` of the largest logit, else None.

    `what` names the source of `wanted` in the message, for example 'base + adapter'.
    """
    for one, other in zip(found, wanted, strict=True):
        bound = allowed * float(other.abs().max())
        apart = float((one - other).abs().max())
        if not apart <= bound:
            return (
                f'the logits of the merged model differ from those of {what} by up to {apart:.4g}. Rounding explains '
                f'only {bound:.4g}.'
            )
    return None


def _settings_fault(reopened: Any, tokenizer: Any, expected: Expected, written: Written) -> str | None:
    """Return a message if tokenizer, generation settings or tied weights are not as expected, else None."""
    if tokenizer.get_vocab() != expected.tokenizer.get_vocab():
        return 'the merged folder has another vocabulary than the model was trained with.'
    if (tokenizer.chat_template or None) != (expected.tokenizer.chat_template or None):
        return 'the merged folder has another chat template than the model was trained with.'
    if _settings(reopened.generation_config) != expected.settings:
        return 'the merged folder has other generation settings than were written.'
    if is_tied(reopened) != (written.tied or expected.tied):
        return 'the output head is tied in the model or in the merged folder, but not in both.'
    return None


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


def _settings(config: GenerationConfig) -> dict[str, Any]:
    names = (
        'eos_token_id', 'pad_token_id', 'bos_token_id', 'do_sample', 'max_new_tokens', 'temperature', 'top_k',
        'top_p', 'repetition_penalty',
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _replaced(target: Path) -> Path:
    return target.with_name(f'.{target.name}.replaced')


def _recover(target: Path) -> None:
    """Restore the earlier folder `target` if an earlier `put_in_place` was interrupted between its two renames."""
    if not target.exists() and _replaced(target).exists():
        _replaced(target).rename(target)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a complete folder to `target`.

    If `target` exists, it first gets a temporary name. After the rename, its files that merging does not write, such as
    GGUF files, are moved to the new folder, and the rest is deleted. If the rename fails, `target` gets its name back,
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
    _keep_other_files(earlier, target)
    shutil.rmtree(earlier, ignore_errors=True)


def _keep_other_files(earlier: Path, target: Path) -> None:
    """Move the files that merging does not write, such as answers and GGUF files, from `earlier` to `target`."""
    if not earlier.is_dir():
        return
    own = {*carried_files(earlier), MERGE_JSON, SFT_ARGS}
    kept = [
        path
        for path in sorted(earlier.iterdir())
        if path.is_file() and path.name not in own and path.suffix != SUFFIX and not (target / path.name).exists()
    ]
    for path in kept:
        path.rename(target / path.name)
    if kept:
        names = ', '.join(path.name for path in kept)
        logger.info(f'{target} keeps these files of the earlier merged folder: {names}')
