"""Training a vision tower on two gloo processes, where DDP searches each forward pass for unused parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import ROOT
from tests.support.tiny_models import make_model
from utils.cli.arguments import SftArguments
from utils.loading.layers import trains_towers
from utils.train.trainer_args import training_arguments


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_train_a_model_whose_tower_a_batch_does_not_use(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         str(ROOT / 'tests' / 'support' / 'ddp_step.py'), str(tmp_path)],
        cwd=ROOT, text=True, capture_output=True, timeout=200, check=False, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        worst, largest, compared = json.loads((tmp_path / f'{rank}.json').read_text())
        assert worst <= 1e-5 * max(1.0, largest) and compared == 21


def test_ddp_searches_for_unused_parameters_only_if_a_tower_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr('utils.train.trainer_args.Seq2SeqTrainingArguments', lambda **given: seen.update(given))
    monkeypatch.setenv('WORLD_SIZE', '2')
    asked = SftArguments(freeze_vision=False)
    for trains in (False, True):
        training_arguments(asked, tmp_path, dtype=torch.float32, evaluates=False, trains_tower=trains)
        assert seen['ddp_find_unused_parameters'] is trains

    text = make_model()
    assert not trains_towers(text)
    tower = torch.nn.Linear(2, 2)
    seeing: Any = torch.nn.Module()
    seeing.language, seeing.tower = text, tower
    seeing.get_decoder, seeing.get_output_embeddings = (lambda: text.model), (lambda: text.lm_head)
    assert trains_towers(seeing)
    tower.requires_grad_(False)
    assert not trains_towers(seeing)
