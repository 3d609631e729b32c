"""What a run leaves behind and says at its end."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.base.checkpoint import last_checkpoint
from utils.base.errors import Stopped
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.packages import versions
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Ready
from utils.proofs.secrecy import prove_secrecy
from utils.report.html import write_report
from utils.run.curves import plot_curves
from utils.run.folder import Run
from utils.run.lock import flag_words, typed_words
from utils.run.read_back import HISTORY_JSON
from utils.run.record import RUN_JSON
from utils.train.callbacks import peak_memory_gib

if TYPE_CHECKING:
    from utils.infer.before_after import BeforeAfter
    from utils.train.trainer import SftTrainer


def resume_command(done: Ready[SftArguments], checkpoint: Path) -> str:
    """Return the command line that goes on from a checkpoint: the flags that were typed, the hub token left out."""
    words = [*typed_words(done, 'resume_from_checkpoint'), *flag_words('resume_from_checkpoint', checkpoint)]
    machines = dist.world_size() // dist.local_world_size()
    launcher = 'torchrun' if dist.started_by_torchrun() else 'python'
    if dist.started_by_torchrun():
        launcher += f' --nproc_per_node {dist.local_world_size()}' + (f' --nnodes {machines}' if machines > 1 else '')
    return shlex.join([*launcher.split(), 'llm_sft.py', *words])


def stopped(trainer: SftTrainer, run_dir: Path, done: Ready[SftArguments]) -> Stopped:
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


def finish_run(
    args: SftArguments, trainer: SftTrainer, run: Run, *, started: float, data: dict[str, Any], asked: BeforeAfter
) -> Path:
    """Write run.json, the curves and the report, say what to run next; returns the best checkpoint."""
    state, run_dir = trainer.state, run.folder
    asked.write(trainer.model, run_dir)
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
            'decisions': run.decisions,
            'warnings': run.warnings,
            'versions': versions(),
            'toolkit': run.lock['toolkit'],
        },
    )
    write_json(run_dir / HISTORY_JSON, state.log_history)
    pictures = plot_curves(state.log_history, run_dir / 'images')
    logger.info(f'curves: {run_dir / "images"} ({len(pictures)} pictures), tensorboard --logdir {run_dir / "runs"}')
    write_report(run_dir)
    prove_secrecy(run_dir, args)
    logger.info(f'report: {write_report(run_dir)}')
    logger.info(f'best checkpoint: {best}')
    use = shlex.join(['python', 'llm_infer.py', *flag_words('ckpt_dir', best)])
    logger.info(f'next: {use}')
    logger.info(f'chat: {use} --eval_human true')
    return best
