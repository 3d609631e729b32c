"""What a run leaves behind and says at its end."""

from __future__ import annotations

import platform
import shlex
import signal
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import dist
from utils.argument import SftArguments, flag_types
from utils.callbacks import peak_memory_gib
from utils.checkpoint import last_checkpoint
from utils.errors import Stopped
from utils.logger import logger
from utils.plot import plot_curves
from utils.resolution import Resolution
from utils.run_dir import RUN_JSON, write_json

if TYPE_CHECKING:
    from utils.trainer import SftTrainer

_LIBRARIES = ('torch', 'transformers', 'peft', 'accelerate', 'tokenizers', 'numpy')


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the numbers."""
    return {'python': platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def resume_command(done: Resolution[SftArguments], checkpoint: Path) -> str:
    """Return the command line that goes on from a checkpoint: the flags that were typed, the hub token left out."""
    left_out = {'hub_token', 'resume_from_checkpoint'}
    words = []
    for name in flag_types(SftArguments):
        if name in done.typed - left_out:
            value = getattr(done.args, name)
            words += [f'--{name}', *([str(v) for v in value] if isinstance(value, list) else [_typed(value)])]
    machines = dist.world_size() // dist.local_world_size()
    launcher = 'torchrun' if dist.started_by_torchrun() else 'python'
    if dist.started_by_torchrun():
        launcher += f' --nproc_per_node {dist.local_world_size()}' + (f' --nnodes {machines}' if machines > 1 else '')
    return shlex.join([*launcher.split(), 'llm_sft.py', *words, '--resume_from_checkpoint', str(checkpoint)])


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def stopped(trainer: SftTrainer, run_dir: Path, done: Resolution[SftArguments]) -> Stopped:
    """Return what to raise after a signal: where the run stands and how to go on."""
    signum = trainer.signals.signum or signal.SIGTERM  # another process was told, this one was not
    checkpoint = run_dir / f'checkpoint-{trainer.state.global_step}'
    how = (
        'holds weights alone (--only_save_model true) and cannot be resumed from.'
        if trainer.args.save_only_model
        else f'goes on to the same bits with:\n{resume_command(done, checkpoint)}'
    )
    return Stopped(
        f'stopped by {signal.Signals(signum).name} after step {trainer.state.global_step} of '
        f'{trainer.state.max_steps}; {checkpoint} is complete. It {how}',
        signum=signum,
    )


def finish_run(trainer: SftTrainer, run_dir: Path, *, started: float, data: dict[str, Any]) -> Path:
    """Write run.json and the curves, say what to run next; returns the best checkpoint."""
    state = trainer.state
    evaluations = [entry for entry in state.log_history if 'eval_runtime' in entry]
    best = Path(state.best_model_checkpoint or str(last_checkpoint(run_dir)))
    write_json(
        run_dir / RUN_JSON,
        {
            'steps': state.global_step,
            'processes': dist.world_size(),
            'seconds': round(time.time() - started, 1),
            'train_tokens_per_second': trainer.speedometer.tokens_per_second(),
            'peak_memory_gib': peak_memory_gib(),
            'preflight_seconds': trainer.preflight_seconds,
            'loss_spikes': trainer.guard.spikes,
            'steps_skipped_in_fp16': trainer.guard.skipped,
            'train_loss': next((e['loss'] for e in reversed(state.log_history) if 'loss' in e), None),
            'last_evaluation': evaluations[-1] if evaluations else None,
            'best_checkpoint': str(best),
            'data': data,
            'versions': versions(),
        },
    )
    pictures = plot_curves(state.log_history, run_dir / 'images')
    logger.info(f'curves: {run_dir / "images"} ({len(pictures)} pictures), tensorboard --logdir {run_dir / "runs"}')
    logger.info(f'best checkpoint: {best}')
    logger.info(f'next: python llm_infer.py --ckpt_dir {best}')
    logger.info(f'chat: python llm_infer.py --ckpt_dir {best} --eval_human true')
    return best
