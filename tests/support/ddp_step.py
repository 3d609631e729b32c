"""Two gloo processes compute one step of a model whose vision tower is trained, and compare it with one process.

Run by torchrun. Argument: a folder. Each process writes the largest difference of a gradient to `<rank>.json`.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.support.exactness import make_rows
from tests.support.tiny_models import make_model
from utils.data.collator import Collator
from utils.fast.chunked_loss import find_head
from utils.fast.scoring import Scorer
from utils.train.trainer import clear_only_trained


class WithTower(torch.nn.Module):
    """A language model with parameters that a batch without images does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.language = make_model(seed=0)
        self.tower = torch.nn.Linear(4, 4)

    def forward(self, **inputs: Any) -> Any:
        return self.language(**inputs)


def gradients(model: WithTower, run: Any, parts: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Return the gradients of the losses of these batches, of which the last one exchanges them if `run` is DDP."""
    model.zero_grad()
    scorer = Scorer(model.language, find_head(model.language))
    for part in parts:
        scorer.loss(run, Collator(5)(part), 10.0).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_place(rows: list[dict[str, Any]], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference if DDP exchanges the gradients in place and the trainer's zero_grad clears them."""
    language = make_model(seed=0)
    wrapped = DistributedDataParallel(language, gradient_as_bucket_view=True)
    clear_only_trained(wrapped)
    scorer = Scorer(language, find_head(language))
    places = []
    for _ in range(3):  # DDP arranges its memory anew after the first step
        with wrapped.no_sync():
            scorer.loss(wrapped, Collator(5)(rows[:1]), 10.0).backward()
        scorer.loss(wrapped, Collator(5)(rows[1:]), 10.0).backward()
        grads = {name: p.grad.clone() for name, p in language.named_parameters() if p.grad is not None}
        wrapped.zero_grad()
        assert not any(p.grad.any() for p in language.parameters())
        places.append([p.grad.data_ptr() for p in language.parameters()])
    assert places[1] == places[2], 'no second copy'
    return max(float((2 * grad - wanted[f'language.{name}']).abs().max()) for name, grad in grads.items())


def compute(rank: int) -> list[float]:
    """Return the largest difference of a gradient, the largest gradient, and the number of gradients."""
    rows = make_rows(390)
    model = WithTower()
    wanted = gradients(model, model, [rows[:2], rows[2:]])
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    found = gradients(model, wrapped, [rows[2 * rank : 2 * rank + 2]])
    again = gradients(model, wrapped, [rows[2 * rank : 2 * rank + 2]])
    assert found.keys() == again.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    worst = max(float((2 * found[name] - grad).abs().max()) for name, grad in wanted.items())
    worst = max(worst, in_place(rows[2 * rank : 2 * rank + 2], wanted))
    return [worst, max(float(grad.abs().max()) for grad in wanted.values()), len(wanted)]


def main() -> None:
    """Compute and compare."""
    # If a process waits for the other one for too long, it prints where it waits, and ends.
    faulthandler.dump_traceback_later(100, exit=True)
    distributed.init_process_group('gloo')
    result = compute(distributed.get_rank())
    Path(sys.argv[1], f'{distributed.get_rank()}.json').write_text(json.dumps(result))
    # Objects of DDP that outlive the process group may wait for it forever, so `compute` has dropped them.
    distributed.destroy_process_group()


if __name__ == '__main__':
    main()
