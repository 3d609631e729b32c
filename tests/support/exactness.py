"""Tiny models on the fast path and on the plain one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from tests.support.modern_models import PLAIN, SEEING, saved_model
from tests.support.old_models import original_folder
from utils.cli.arguments import SftArguments
from utils.data.collator import Collator
from utils.loading.fingerprint import Fingerprint
from utils.loading.info import LoadOptions
from utils.loading.opening import open_entry
from utils.loading.weights import Weights
from utils.model import MODEL_MAPPING
from utils.run.folder import Run
from utils.run.record import RunRecord
from utils.train.prepare import prepare_model

LENGTHS = (11, 3, 30, 17)


def open_tiny(key: str, folder: Path) -> Any:
    """Return a tiny fp32 model with random weights of a key's class, opened by the key's own loader."""
    info = MODEL_MAPPING[key]
    folder = saved_model(key, folder) if key in PLAIN or key in SEEING else original_folder(key, folder)
    model = open_entry(folder, info, LoadOptions(torch_dtype=torch.float32))[0]
    for module in model.modules():  # some classes use dropout by default
        for field in {'attention_dropout', 'residual_dropout'} & set(vars(module)):
            setattr(module, field, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.6)  # with larger weights, tiny models amplify rounding more than any real model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return model


def make_rows(size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of different lengths. The second half of each is trained, and one row as a whole."""
    rng = random.Random(seed)
    spans = [(n // 2, n) for n in LENGTHS[:-1]] + [(0, LENGTHS[-1])]
    return [
        {'input_ids': [rng.randrange(6, size) for _ in range(n)], 'trained': span, 'prompt_length': span[0]}
        for n, span in zip(LENGTHS, spans, strict=True)
    ]


def plain_gradients(model: Any, rows: list[dict[str, Any]], divisor: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients as transformers computes them: with padded rows and its own loss."""
    batch = Collator(5, pads=True)(rows)
    inputs = {name: batch[name] for name in ('input_ids', 'attention_mask', 'labels')}
    model.zero_grad()
    loss = model(**inputs, num_items_in_batch=divisor, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def bare_run(folder: Path) -> Run:
    """Return a run in a new folder, for a trainer without a command line."""
    folder.mkdir()
    weights = Weights(path=folder, reason='', fingerprint=Fingerprint(sha256='', covers='whole'))
    return Run(folder=folder, record=RunRecord(), weights=weights)


def prepared(model: Any, key: str, kind: str, **flags: Any) -> tuple[Any, SftArguments]:
    """Return the model with adapters that are not zero, or with all weights trainable."""
    args = SftArguments(sft_type=kind, lora_target_modules=list(MODEL_MAPPING[key].lora_target_modules), **flags)
    torch.manual_seed(1)
    tuned = prepare_model(model, args)
    for name, parameter in tuned.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned.train(), args
