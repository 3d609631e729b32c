"""The sizes of a model that determine its memory.

They are counted on an instance of the model's class without weights, or read from the table model_sizes.json.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.loading.folder import read_config
from utils.loading.info import ModelInfo
from utils.loading.layers import last_name
from utils.loading.legacy.opening import build_empty
from utils.loading.legacy.registry import find_family, find_saved
from utils.loading.opening import get_text_model_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Path of linear layers, with # for the index of the layer -> {(in, out): the indices of the layers of this size}. The
# index is None for a path without an index.
Sizes = dict[str, dict[tuple[int, int], list[int | None]]]
TABLE = Path(__file__).with_name('model_sizes.json')


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model: numbers of parameters, layers and heads, and widths (numbers of values per token)."""

    model_class: str
    parameters: int
    # Parts of `parameters`: the input embedding, the output head (0 if tied), stacked experts, the vision tower.
    embedding: int
    head: int
    experts: int
    tower: int
    # Number of parameters that are used for one token, including the head. Of the experts, only those that the router
    # chooses for the token are counted.
    active: int
    hidden: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    # Number of values that all norms normalise for one token.
    normed: int
    # Sum over all layers of the width inside the MLP: the input width of its last linear layer.
    inner: int
    # Whether the MLPs have a gate.
    gated: bool
    # `rows`: rows can be concatenated. `mixed`: the same, but some layers have a recurrent state instead of attention.
    # With all other values, rows are padded. `padded mixed`: some layers have neither attention nor a known state.
    # `alibi`: a bias by distance is added to the scores. `eager`: all scores are saved. `padded`: none of these.
    attention: str
    # Linear layers by path, with # for the index of the layer: [indices, in, out] for each size. The indices are text
    # like '0-3 8'. The head and the vision tower are not included.
    modules: dict[str, list[tuple[str, int, int]]]
    # Stacked expert parameters by name: [layers, experts, in, out].
    stacked: dict[str, list[int]]

    @functools.cached_property
    def paths(self) -> dict[str, tuple[int, int]]:
        """Return a dict from the path of each linear layer to its numbers of input and output features."""
        return {
            path: (rows, columns)
            for pattern, sizes in self.modules.items()
            for indices, rows, columns in sizes
            for path in _unfolded(pattern, indices)
        }

    @functools.cached_property
    def linear(self) -> dict[str, list[list[int]]]:
        """Return the sizes of all linear layers by layer name, for example {'q_proj': [[24, 896, 896]]}.

        In the example, 24 layers are named q_proj. Each of them has 896 input features and 896 output features.
        """
        return self.sizes_of(self.paths)

    def sizes_of(self, paths: Iterable[str]) -> dict[str, list[list[int]]]:
        """Return the sizes of the linear layers at `paths` by layer name, for example {'q_proj': [[24, 896, 896]]}.

        In the example, 24 of the layers are named q_proj. Each of them has 896 input features and 896 output features.
        """
        counts = Counter((last_name(path), *self.paths[path]) for path in paths)
        found: dict[str, list[list[int]]] = {}
        for (name, rows, columns), count in counts.items():
            found.setdefault(name, []).append([count, rows, columns])
        return found

    @property
    def linear_parameters(self) -> int:
        """Return the number of parameters of all linear layers, without the output head and the vision tower."""
        return sum(count * rows * columns for sizes in self.linear.values() for count, rows, columns in sizes)


def _unfolded(pattern: str, indices: str) -> list[str]:
    """Return the paths that a pattern and its indices describe: 'layers.#.q_proj' with '0-3 8' gives five paths."""
    paths = []
    for part in indices.split():
        first, _, last = part.partition('-')
        paths += [pattern.replace('#', str(index), 1) for index in range(int(first), int(last or first) + 1)]
    return paths or [pattern]


def _folded(indices: Sequence[int | None]) -> str:
    """Return sorted layer indices as a short text: [0, 1, 2, 3, 8] gives '0-3 8', and [None] gives an empty text."""
    runs: list[list[int]] = []
    for index in indices:
        if index is None:
            continue
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ' '.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)


def known_shape(model_type: str | None) -> Shape | None:
    """Return the sizes of a --model_type from model_sizes.json, or None if it is not in this table."""
    table = json.loads(TABLE.read_text(encoding='utf-8'))
    name = table['models'].get(model_type)
    return Shape(**table['shapes'][name]['shape']) if name else None


def shape_of(model_dir: Path, info: ModelInfo) -> Shape:
    """Return the sizes of the model that is described by config.json in `model_dir`. No weights are read."""
    import torch

    with torch.device('meta'):
        return measure(_empty(model_dir, info))


def _empty(model_dir: Path, info: ModelInfo) -> PreTrainedModel:
    import transformers as t

    config = read_config(model_dir)
    if family := find_family(config, info.family) or find_saved(config):
        return build_empty(family, model_dir)

    native = t.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    if info.get_function is get_text_model_tokenizer:
        native = native.get_text_config()
    text_classes = t.MODEL_FOR_CAUSAL_LM_MAPPING
    vision_classes = t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    only_vision = type(native) in vision_classes and type(native) not in text_classes
    cls = (vision_classes if only_vision else text_classes)[type(native)]
    return cls(native)


def measure(model: PreTrainedModel) -> Shape:
    """Return the sizes of a model. The parameters of the model can be on the meta device."""
    from utils.loading.layers import expert_names, find_towers

    config = model.config.get_text_config()
    settings = config.to_dict()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    tower_names = find_towers(model)
    towers = [module for name, module in model.named_modules() if name in tower_names]

    heads = config.num_attention_heads
    kv_heads = settings.get('num_key_value_heads') or heads
    modules, normed = _layers(model, towers, heads, kv_heads)
    linear: dict[str, dict[tuple[int, int], int]] = {}
    for path, of_path in modules.items():
        for size, indices in of_path.items():
            counts = linear.setdefault(last_name(path), {})
            counts[size] = counts.get(size, 0) + len(indices)

    stacked = {
        name: [count, *next(p.shape for n, p in model.named_parameters() if n.endswith(f'.{name}'))]
        for name, count in expert_names(model).items()
    }
    experts = sum(count * n * rows * columns for count, n, rows, columns in stacked.values())
    chosen = settings.get('num_experts_per_tok') or 0
    share = chosen / next(iter(stacked.values()))[1] if stacked else 0.0

    tower = sum(p.numel() for module in towers for p in module.parameters())
    total = sum(p.numel() for p in model.parameters())
    own_head = 0 if head.weight is embedding else head.weight.numel()

    return Shape(
        model_class=type(model).__name__,
        parameters=total,
        embedding=embedding.numel(),
        head=own_head,
        experts=experts,
        tower=tower,
        active=total - tower - (embedding.numel() if own_head else 0) - round(experts * (1 - share)),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=embedding.shape[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=settings.get('head_dim') or config.hidden_size // heads,
        normed=normed,
        inner=_inner(settings, linear, stacked, chosen),
        gated=any(name in linear for name in ('gate_proj', 'gate_up_proj', 'w1')) or bool(stacked),
        attention=_attention(model),
        modules={
            path: [(_folded(indices), *size) for size, indices in sizes.items()] for path, sizes in modules.items()
        },
        stacked=stacked,
    )


def _layers(model: PreTrainedModel, towers: list[Any], heads: int, kv_heads: int) -> tuple[Sizes, int]:
    """Return {path: {(in, out): layer indices}} of the linear layers, and the number of norm values.

    The number of norm values is how many values all norms together compute for one token.
    A path has # in place of the layer index, e.g. 'layers.#.q_proj'. The head and the vision tower are not included.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    excluded = {id(part) for module in (*towers, model.get_output_embeddings()) for part in module.modules()}
    modules: Sizes = {}
    normed = 0
    for name, module in model.named_modules():
        last = name.rpartition('.')[2]
        if id(module) in excluded:
            continue

        if isinstance(module, torch.nn.Linear | Conv1D):
            rows, columns = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            index = next((part for part in name.split('.') if part.isdigit()), None)
            pattern = name if index is None else name.replace(f'.{index}.', '.#.', 1)
            indices = modules.setdefault(pattern, {}).setdefault((rows, columns), [])
            indices.append(None if index is None else int(index))
        elif 'norm' in type(module).__name__.lower():
            normed += {'q_norm': heads, 'k_norm': kv_heads}.get(last, 1) * module.weight.numel()
    return modules, normed


def _inner(
    settings: dict[str, Any], linear: dict[str, dict[tuple[int, int], int]], stacked: dict[str, list[int]], k: int
) -> int:
    """Return the intermediate sizes of the MLPs, summed over all layers.

    A layer with experts counts with the sizes of the `k` experts that a token uses.
    """
    dense = next((linear[n] for n in ('down_proj', 'w2', 'dense_4h_to_h') if n in linear), None)
    if dense is None and 'c_fc' in linear:
        dense = {(columns, rows): count for (rows, columns), count in linear['c_fc'].items()}
    width = sum(count * rows for (rows, _), count in (dense or {}).items())
    if not stacked:
        return width

    per_expert: int = settings.get('moe_intermediate_size') or settings.get('intermediate_size', 0)
    layers = next(iter(stacked.values()))[0]
    return width + k * per_expert * layers


def _attention(model: PreTrainedModel) -> str:
    """Return the kind of attention of this model. The comment at `Shape.attention` explains the values."""
    from utils.fast.layout import why_padded
    from utils.loading.layers import ATTENDING

    padded = why_padded(model, longest=1) is not None
    if set(model.config.get_text_config().to_dict().get('layer_types') or ()) - ATTENDING:
        return 'padded mixed' if padded else 'mixed'
    if not padded:
        return 'rows'
    if type(model).__name__.startswith('Alibi'):
        return 'alibi'
    return 'padded' if model._supports_sdpa else 'eager'
