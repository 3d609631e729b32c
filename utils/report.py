"""What a run leaves behind and says at its end."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.callbacks import peak_memory_gib
from utils.logger import logger
from utils.plot import plot_curves
from utils.run_dir import RUN_JSON, write_json

if TYPE_CHECKING:
    from utils.trainer import SftTrainer

_LIBRARIES = ('torch', 'transformers', 'peft', 'accelerate', 'tokenizers', 'numpy')


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the numbers."""
    return {'python': platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def last_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run, None before the first."""
    checkpoints = [p for p in run_dir.glob('checkpoint-*') if p.name.removeprefix('checkpoint-').isdigit()]
    return max(checkpoints, key=lambda p: int(p.name.removeprefix('checkpoint-')), default=None)


def interrupted(trainer: SftTrainer, run_dir: Path) -> str:
    """Return what to say after Ctrl-C: where the run stands and how to go on."""
    last = last_checkpoint(run_dir)
    resume = f' Go on with --resume_from_checkpoint {last}' if last and not trainer.args.save_only_model else ''
    return f'stopped by Ctrl-C at step {trainer.state.global_step}; last checkpoint: {last or "none yet"}.{resume}'


def finish_run(trainer: SftTrainer, run_dir: Path, *, started: float, data: dict[str, Any]) -> Path:
    """Write run.json and the curves, say what to run next; returns the best checkpoint."""
    state = trainer.state
    evaluations = [entry for entry in state.log_history if 'eval_runtime' in entry]
    best = Path(state.best_model_checkpoint or str(last_checkpoint(run_dir)))
    write_json(
        run_dir / RUN_JSON,
        {
            'steps': state.global_step,
            'seconds': round(time.time() - started, 1),
            'train_tokens_per_second': trainer.speedometer.tokens_per_second(),
            'peak_memory_gib': peak_memory_gib(),
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
