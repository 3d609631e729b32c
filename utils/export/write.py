"""Writes the folder of a merged model.

If possible, the files of the base are copied and the changed tensors are replaced. Otherwise the whole model is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import device
from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.cli.arguments import InferArguments
from utils.cli.resolution import Ready
from utils.export.patch import Patch, plan_patch, release, write_patched
from utils.export.same import MERGE_JSON, compare, file_changes
from utils.loading.chat_template import replace_templates
from utils.loading.gguf import model_directory
from utils.loading.image_processors import Images
from utils.loading.save import add_end_token, save_whole
from utils.loading.tokenizer_files import has_tokens
from utils.loading.weights import Weights
from utils.run.open_model import open_model
from utils.run.record import RunRecord, Trained

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

_SETTINGS = 'generation_config.json'
# A value of --dtype -> its name in torch.
_TORCH_NAMES = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model into which an adapter is merged."""

    # The folder from which the base was opened, and its family if it has a layout of 2023.
    folder: Path
    family: str | None = None
    # The adapter that is merged.
    checkpoint: Path
    # The name in torch of the dtype that the user asks for.
    dtype: str | None = None
    # Whether a flag changes the image processor.
    new_processor: bool = False
    # Opens model and tokenizer of a folder as the base was opened: in the same class, on the same devices.
    reopen: Callable[[Path], tuple[Any, Any]]


def find_base(done: Ready[InferArguments], trained: Trained, weights: Weights) -> Base:
    """Return the base of a merge. Its function `reopen` loads a model with the flags in `done`."""

    def reopen(folder: Path) -> tuple[Any, Any]:
        model, tokenizer, _ = open_model(
            done.args, done.info, replace(weights, path=folder), trains=False, decide=lambda *_: None
        )
        return model, tokenizer

    return Base(
        folder=model_directory(weights.path),
        family=done.info.family,
        checkpoint=trained.checkpoint,
        dtype=_TORCH_NAMES[str(done.args.dtype)] if 'dtype' in done.typed else None,
        new_processor=done.args.max_pixels is not None,
        reopen=reopen,
    )


@dataclass(frozen=True, kw_only=True)
class Written:
    """How a merged folder was written."""

    says: str
    # The names in torch of the dtypes of the weights in the files.
    dtypes: set[str]
    # The logits of the merged model in memory, if it was in memory.
    made: Sequence[torch.Tensor] | None = None
    # What `is_tied` returned for the merged model in memory. Merging may untie the head.
    tied: tuple[bool, bool] | None = None
    # The share of the changes of the weights that rounding keeps, if the files of the base were copied.
    kept: float | None = None


def write_merged(
    model: Any,
    folder: Path,
    *,
    tokenizer: Any,
    images: Images | None,
    settings: GenerationConfig,
    record: RunRecord,
    base: Base | None,
    probe: Callable[[Any], list[torch.Tensor]],
) -> Written:
    """Write the merged model to the new folder `folder`. The PeftModel `model` cannot be used afterwards.

    `settings` are the generation settings of the merged model, and `probe` computes the logits of a model. Raises
    ConfigError if a file of the base was not copied correctly.
    """
    patch: Patch | str = 'its base is only in memory'
    if base is not None:
        patch = plan_patch(model, base.folder, base.checkpoint, family=base.family, dtype=base.dtype)
        if not has_tokens(base.folder, tokenizer):
            patch = 'the tokenizer has tokens that the files of the base lack'

    if isinstance(patch, str):
        merged = model.merge_and_unload(safe_merge=True)
        made = probe(merged)
        merged.generation_config = settings
        save_whole(merged, tokenizer, folder, images)
        says = f'all files are written anew by {type(merged).__name__}: {patch}'
        dtype = str(next(merged.parameters()).dtype).removeprefix('torch.')
        written = Written(says=says, dtypes={dtype}, made=made, tied=is_tied(merged))
    else:
        release(model)
        hashes, kept = write_patched(patch, folder)
        add_end_token(tokenizer, settings)
        replace_templates(folder, tokenizer.chat_template)
        if images is not None and base is not None and base.new_processor:
            images.save(folder)
        _write_settings(settings, patch.base, folder)
        stated = {'base': record.base_model, 'tensors': hashes, 'files': file_changes(folder, patch.base)}
        write_json(folder / MERGE_JSON, stated)

        made_same = compare(folder, patch.base)
        if made_same.differences:
            raise ConfigError(
                f'{folder}: not copied correctly from {patch.base}: {made_same.differences[0]}. Check the disk, then '
                'merge again.'
            )
        written = Written(says=made_same.says(), dtypes=patch.dtypes(), kept=kept)

    record.with_flags(sft_type='full').write(folder)
    release(model)
    device.free_unused()
    return written


def _write_settings(settings: GenerationConfig, base: Path, folder: Path) -> None:
    """Write generation_config.json to `folder` if `settings` differ from those in the folder `base`."""
    from transformers import GenerationConfig

    has_file = (base / _SETTINGS).is_file()
    if not has_file or GenerationConfig.from_pretrained(base).to_dict() != settings.to_dict():
        settings.save_pretrained(folder)


def is_tied(model: Any) -> tuple[bool, bool]:
    """Return two booleans: whether output head and embedding share one tensor, and whether the config says so."""
    head = model.get_output_embeddings()
    shared = head is not None and head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    # Some vision models store tie_word_embeddings only for the whole model, not for the language model.
    settings = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    return shared, bool(settings.get('tie_word_embeddings'))
