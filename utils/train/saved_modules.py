"""--lora_modules_to_save: layers whose full weights are trained, besides the adapter, and stored with the adapter.

PEFT trains a copy of each layer. The copy is held in fp32, like the adapter, and computes in the dtype of the model.
With DeepSpeed, the copy keeps the dtype of the model, and DeepSpeed holds its values in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from utils.base.errors import ConfigError, did_you_mean
from utils.fast.swap import swap_class
from utils.loading.layers import is_in, named_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from utils.cli.arguments import SftArguments

# Names that every model answers to: its input embedding and its output head, whatever they are called in its class.
EMBEDDING = 'embed_tokens'
HEAD = 'lm_head'


class _HeldLinear(nn.Module):
    """Mixin for a linear layer whose weights are in fp32, but which computes in the dtype of its input."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the linear layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class _HeldOther(nn.Module):
    """Mixin for an embedding or a norm whose weights were changed to fp32. The dtype of its output does not change."""

    held_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the layer, in `held_dtype`."""
        out: torch.Tensor = super().forward(*args, **kwargs)
        return out.to(self.held_dtype)


def find_saved(
    model: PreTrainedModel, wanted: Sequence[str], *, adapted: Collection[str] = (), frozen: Sequence[str] = ()
) -> list[str]:
    """Return the paths of the layers that `wanted` names, without duplicates.

    `adapted` are the paths of the layers that get LoRA. `frozen` are the paths of modules that are not trained.

    Raises ConfigError if a word matches no layer, or if it matches a module that contains several layers. Also raises
    ConfigError if a matched layer gets LoRA, has quantised weights, or is no linear layer, embedding or norm.
    """
    layers = {path: module for path, module in model.named_modules() if path and any(True for _ in module.parameters())}
    ends = {EMBEDDING: model.get_input_embeddings(), HEAD: model.get_output_embeddings()}
    found: dict[str, None] = {}
    problems: list[str] = []

    for word in wanted:
        matched = [path for path, module in layers.items() if module is ends.get(word)]
        matched = matched[:1] or [path for path in named_by([word], layers) if not is_in(path, frozen)]
        if problem := _problem(word, matched, layers, adapted, frozen):
            problems.append(f"--lora_modules_to_save '{word}' {problem}")
        found.update(dict.fromkeys(matched))

    if problems:
        raise ConfigError(*problems)
    return list(found)


def _problem(
    word: str, matched: Sequence[str], layers: dict[str, Any], adapted: Collection[str], frozen: Sequence[str]
) -> str | None:
    """Return the end of a message that says why the layers `matched` cannot be trained, or None if they can be trained.

    The message begins with `word`.
    """
    if not matched:
        names = {path.rpartition('.')[2] for path in layers if not path.rpartition('.')[2].isdigit()}
        tower = ' It belongs to the vision tower: add --freeze_vision false.' if named_by([word], layers) else ''
        return f'names no layer with weights{did_you_mean(word, [EMBEDDING, HEAD, *sorted(names)])}{tower}'
    if both := [path for path in matched if is_in(path, list(adapted)) or any(is_in(a, [path]) for a in adapted)]:
        return f'and --lora_target_modules both name {both[0]}. Remove it from one of the two.'

    for path in matched:
        parameters = dict(layers[path].named_parameters())
        if any('.' in name for name in parameters):
            inner = next(iter(parameters)).rpartition('.')[0]
            return f'holds several layers. Name its layers instead, e.g. {path.rpartition(".")[2]}.{inner}.'
        is_known = isinstance(layers[path], nn.Linear | nn.Embedding) or all(p.ndim == 1 for p in parameters.values())
        if not is_known or not all(p.is_floating_point() for p in parameters.values()):
            return f'is a {type(layers[path]).__name__}, whose weights cannot be trained whole. Remove it.'
    return None


def with_tied(model: PreTrainedModel, paths: Sequence[str]) -> tuple[list[str], bool]:
    """Return `paths` with all layers that are tied to them, and whether a layer in `paths` is tied.

    If the input embedding and the output head share one tensor, training either of them trains both.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    is_tied = ends[1] is not None and ends[1].weight is ends[0].weight
    if not is_tied or not any(model.get_submodule(path) is end for path in paths for end in ends):
        return list(paths), False
    both = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    return list(dict.fromkeys([*paths, *both])), True


def check_saved(model: Any, args: SftArguments, expected: Sequence[str]) -> None:
    """Raise ConfigError if the layers that --adapter stores with full weights are not the layers `expected`."""
    from peft.utils.other import ModulesToSaveWrapper

    base = model.get_base_model()
    found = [path for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    if set(found) == set(expected):
        return
    raise ConfigError(
        f'--lora_modules_to_save {" ".join(args.lora_modules_to_save or [])}: the flag selects '
        f'{" ".join(expected) or "no layer"} of {type(base).__name__}, but the adapter in {args.adapter} stores full '
        f'weights of {" ".join(found) or "no layer"}. Remove --lora_modules_to_save to use the layers of the adapter, '
        'or train a new adapter without --adapter.'
    )


def token_tables(model: PreTrainedModel, ids: Sequence[int], copied: Collection[str]) -> dict[str, list[int]]:
    """Return a dict from the path of a layer to the ids of its trained rows. `ids` are the ids of new tokens.

    The layers are the input embedding and the output head. A head that is tied to the embedding is left out. Layers in
    `copied` are left out too, because they are trained whole. Raises ConfigError if the head is not in `copied` and has
    a bias.
    """
    if not ids:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    found = {}
    for path, module in model.named_modules():
        if path in copied or not (module is embedding or module is head):
            continue
        if module is head and head.bias is not None:
            raise ConfigError(
                f'--new_tokens: the output head of {type(model).__name__} has a bias, but PEFT leaves out this bias if '
                f'only the rows of the new tokens are trained. Add --lora_modules_to_save {HEAD}, which trains the '
                'whole head.'
            )
        if module is embedding or not is_tied:
            found[path] = list(ids)
    return found


def check_tokens(model: Any, ids: Sequence[int]) -> None:
    """Raise ConfigError if the input embedding or the output head does not train the rows of the new tokens `ids`."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    base = model.get_base_model()
    for name, layer in (('embedding', base.get_input_embeddings()), ('output head', base.get_output_embeddings())):
        if isinstance(layer, ModulesToSaveWrapper):
            continue
        if isinstance(layer, TrainableTokensWrapper):
            trained = layer.token_adapter.token_indices
            if any(set(ids) <= set(rows) for rows in trained.values()):
                continue
        raise ConfigError(
            f'--new_tokens: PEFT does not train the rows of the new tokens in the {name} of {type(base).__name__}. Add '
            f'--lora_modules_to_save {EMBEDDING} {HEAD}, which trains the whole embedding and the whole output head.'
        )


def _copies(model: Any) -> Iterator[tuple[Any, nn.Module]]:
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copied in wrapper.modules_to_save.values():
                yield wrapper.original_module, copied


def hold_in_fp32(model: Any) -> None:
    """Hold the trained copies of 16-bit layers in fp32, so that small steps of the optimizer are not rounded away.

    The layers compute in the same dtype as before. Tied copies stay one tensor.
    """
    held: dict[int, nn.Parameter] = {}
    for _, layer in _copies(model):
        for name, parameter in list(layer.named_parameters()):
            if parameter.dtype not in (torch.bfloat16, torch.float16):
                continue
            if id(parameter) not in held:
                held[id(parameter)] = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            setattr(layer, name, held[id(parameter)])
            dtype = parameter.dtype
            if not isinstance(layer, _HeldLinear | _HeldOther):
                vars(layer)['held_dtype'] = dtype
                swap_class(layer, _HeldLinear if isinstance(layer, nn.Linear) else _HeldOther)
