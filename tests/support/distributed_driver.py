"""Runs the programs one after another in the processes that torchrun started, and records what each rank saw.

Argument: a JSON file {"runs": [[program, words], ...], "notes": folder, "fail": [run, rank, step, how] or null}.
A word that starts with `glob:` stands for the one path that matches.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.data.collator import split_rows
from utils.train.trainer import SftTrainer

plan = json.loads(Path(sys.argv[1]).read_text())
rank = int(os.environ['RANK'])
plain_loss = SftTrainer.compute_loss
seen: dict[str, Any] = {}


def noted_loss(self: SftTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Return the trainer's loss. Record batches, rows and parameter classes; die or fail where the plan says so."""
    if self.in_preflight:
        return plain_loss(self, model, inputs, *args, **kwargs)
    seen['batches'] += 1
    seen['rows'] += [ids.tolist() for ids in split_rows(inputs, 'input_ids')]
    seen['parameters'] = sorted({type(p).__name__ for p in self.model.parameters()})
    seen['seeds'] = [self.args.seed, self.args.data_seed]
    loss = plain_loss(self, model, inputs, *args, **kwargs)
    if plan['fail'] and plan['fail'][:3] == [seen['run'], rank, self.state.global_step]:
        if plan['fail'][3] == 'kill -9':
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError(plan['fail'][3])
    return loss


def expand(word: str) -> str:
    """Return the word, or the only path that its pattern matches."""
    if not word.startswith('glob:'):
        return word
    (path,) = Path('/').glob(word.removeprefix('glob:/'))
    return str(path)


def main() -> int:
    """Run everything. Returns the first exit code that is not 0."""
    import deepspeed
    import torch
    from accelerate.state import AcceleratorState, PartialState

    # DeepSpeed would compile collectives over shared memory for a minute; gloo has them already.
    deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False
    # One process group for all runs: a second one would find the keys of the first in torchrun's store.
    torch.distributed.destroy_process_group = lambda *args: None
    SftTrainer.compute_loss = noted_loss  # type: ignore[method-assign]
    for number, (program, words) in enumerate(plan['runs']):
        seen.update(run=number, rows=[], batches=0)
        code = importlib.import_module(program).main([expand(word) for word in words])
        Path(plan['notes'], f'{number}-{rank}.json').write_text(json.dumps(seen))
        if code:
            return int(code)
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        os.environ.pop('ACCELERATE_USE_DEEPSPEED', None)
        torch.distributed.init_process_group = lambda *args, **kwargs: None
    return 0


if __name__ == '__main__':
    sys.exit(main())
