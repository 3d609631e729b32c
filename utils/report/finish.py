"""The end of a run: writes run.json, the curves and report.html, and logs the commands to run next."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.base.cache import cache_dir
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
from utils.run.outcome import says_whether_it_helped, tell_checkpoint, use_commands
from utils.run.read_back import HISTORY_JSON, read_rows
from utils.run.record import RUN_JSON
from utils.train.callbacks import peak_memory_gib, peak_reserved_gib

if TYPE_CHECKING:
    from utils.infer.before_after import BeforeAfter
    from utils.train.trainer import SftTrainer


def resume_command(done: Ready[SftArguments], checkpoint: Path) -> str:
    """Return the command line that resumes the run from a checkpoint.

    It has the typed flags that `typed_words` returns, so it has no hub token. --adapter is left out, because the
    checkpoint holds the adapter.
    """
    words = [*typed_words(done, 'resume_from_checkpoint', 'adapter'), *flag_words('resume_from_checkpoint', checkpoint)]
    launcher = ['python']
    if dist.started_by_torchrun():
        machines = dist.world_size() // dist.local_world_size()
        launcher = ['torchrun', '--nproc_per_node', str(dist.local_world_size())]
        if machines > 1:
            launcher += ['--nnodes', str(machines)]

    return shlex.join([*launcher, 'llm_sft.py', *words])


def stopped(trainer: SftTrainer, run_dir: Path, done: Ready[SftArguments]) -> Stopped:
    """Return the exception to raise after a signal. Its text says at which step the run stopped, and how to resume."""
    signum = trainer.signals.signum or signal.SIGTERM  # signum is 0 if only a different process received the signal
    checkpoint = run_dir / f'checkpoint-{trainer.state.global_step}'
    if trainer.args.save_only_model:
        how = 'It holds only weights (--only_save_model true), so the run cannot be resumed from it.'
    else:
        how = f'Resume with:\n{resume_command(done, checkpoint)}'
    return Stopped(
        f'stopped by {signal.Signals(signum).name} after step {trainer.state.global_step} of '
        f'{trainer.state.max_steps}; {checkpoint} is complete. {how}',
        signum=signum,
    )


def finish_run(
    args: SftArguments, trainer: SftTrainer, run: Run, *, started: float, data: dict[str, Any], asked: BeforeAfter
) -> Path:
    """Write run.json, the curves and the report, and log the commands to run next. Returns the best checkpoint.

    If no checkpoint was found to be the best, returns the last one.

    `asked` generates the answers of the trained model, and writes answers.json. `started` is the time.time() at the
    start of the run. `data` has the facts about the rows for run.json.
    """
    state = trainer.state
    run_dir = run.folder
    asked.write(trainer.model, run_dir)
    ended_early = trainer.early_stop.reason if trainer.early_stop is not None else None
    if ended_early:
        logger.info(ended_early)
        run.decisions.append(ended_early)
    evaluations = [entry for entry in state.log_history if 'eval_runtime' in entry]
    best = Path(state.best_model_checkpoint or str(last_checkpoint(run_dir)))
    metric = trainer.args.metric_for_best_model if state.best_model_checkpoint else None
    line, warning = says_whether_it_helped(
        read_rows(run_dir), state.log_history, holds_out=trainer.eval_dataset is not None, flags=run.record.flags
    )
    if warning:
        run.warnings.append(warning)
    outcome = {
        'steps': state.global_step,
        'ended_early': ended_early,
        'processes': dist.world_size(),
        'seconds': round(time.time() - started, 1),
        'train_tokens_per_second': trainer.speedometer.tokens_per_second(),
        'peak_memory_gib': peak_memory_gib(),
        'peak_reserved_gib': peak_reserved_gib(),
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
    }
    write_json(run_dir / RUN_JSON, outcome)
    write_json(run_dir / HISTORY_JSON, state.log_history)

    pictures = plot_curves(state.log_history, run_dir / 'images', run.record.flags)
    also = f', tensorboard --logdir {run_dir / "runs"}' if 'tensorboard' in args.report_to else ''
    logger.info(f'curves: {run_dir / "images"} ({len(pictures)} pictures){also}')

    # The report is written twice: the scan for secrets must read the report, and the report must show its outcome.
    write_report(run_dir)
    own = [run.weights.path] if run.weights.served is None else []  # an entry of MODEL_MAPPING can name a local folder
    prove_secrecy(run_dir, args, [str(path) for path in own if not path.is_relative_to(cache_dir())])
    logger.info(f'report: {write_report(run_dir)}')

    logger.info(tell_checkpoint(str(best), state.log_history, metric=metric))
    logger.info(line)
    if warning:
        logger.warning(warning)
    for name, command in use_commands(best, outcome).items():
        logger.info(f'{name}: {command}')
    return best
