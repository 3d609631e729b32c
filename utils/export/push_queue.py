"""Pushes checkpoints to a hub during training. A hub that fails or hangs does not stop the training.

Training steps do not wait for a push. After the last step, the program waits for the remaining pushes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.export.push import stage, unstage
from utils.hub import snapshot as hub
from utils.hub.clients import TOKEN_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
# A push that takes longer than this is killed.
PUSH_SECONDS = 3600.0


class Pusher:
    """Pushes staged folders one after the other. Each push is a separate process, which is killed after an hour."""

    def __init__(self, run_dir: Path, environment: dict[str, str], *, keeps_all: bool) -> None:
        """Set up an empty queue. `environment` has the environment variables of the push processes.

        If `keeps_all` is False, a new folder replaces the folders that wait in the queue.
        """
        self.run_dir = run_dir
        self.environment = environment
        self.keeps_all = keeps_all
        # While the thread runs, it pushes the first waiting folder. Failed folders are retried when a folder is added.
        self._waiting: list[Path] = []
        self._failed: list[Path] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, folder: Path) -> None:
        """Add a folder to the queue, and start the thread that pushes. Folders whose push failed are added again.

        If `keeps_all` is False, all other folders in the queue are deleted from the disk, except the folder that is
        being pushed.
        """
        with self._lock:
            self._waiting += [f for f in self._failed if f != folder] + [folder]
            self._failed.clear()
            if not self.keeps_all:
                first = 1 if self._thread else 0
                for old in self._waiting[first:-1]:
                    unstage(old)
                del self._waiting[first:-1]
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
            pushed = self._push(self._waiting[0])
            with self._lock:
                if pushed:
                    self._waiting.pop(0)
                else:  # the next folders would fail too, so all of them are retried when the next checkpoint is added
                    self._failed = self._waiting
                    self._waiting = []

    def _push(self, folder: Path) -> bool:
        words = [sys.executable, '-m', 'utils.export.push', str(self.run_dir.absolute()), folder.name]
        try:
            # The push gets a new session, so that Ctrl-C reaches only the training. The token is passed in the
            # environment, because other users can read a command line.
            done = subprocess.run(
                words, cwd=ROOT, env=self.environment, start_new_session=True, timeout=PUSH_SECONDS, check=False,
                stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8', errors='replace',
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            logger.warning(
                f'{folder.name} could not be pushed in {PUSH_SECONDS:.0f} s, so this push was stopped. The run goes on'
            )
            return False
        except (OSError, ValueError) as error:  # ValueError: the token contains a zero byte
            logger.warning(f'{folder.name} could not be pushed, and the run goes on: {error}')
            return False
        results = [line for line in done.stderr.splitlines() if line.startswith(('pushed ', 'error: '))]
        if done.returncode:
            reason = (results or done.stderr.splitlines() or ['no reason given'])[-1].removeprefix('error: ')
            logger.warning(f'{folder.name} could not be pushed, and the run goes on: {reason}')
            return False
        logger.info(results[-1] if results else f'pushed {folder.name}')
        return True

    def finish(self) -> None:
        """Wait until the queue is empty. If folders were not pushed, log a warning with a command that pushes them."""
        while (thread := self._thread) is not None:
            thread.join()
        if self._failed:
            command = f'python -m utils.export.push {self.run_dir}'
            logger.warning(f'{self.run_dir}: not all checkpoints were pushed. Run {command}')


class PushCallback(TrainerCallback):
    """Pushes the checkpoints that --push_hub_strategy selects. A failed push is logged, and the training continues."""

    def __init__(self, args: SftArguments, token: str, run_dir: Path, data: dict[str, Any]) -> None:
        self.strategy = args.push_hub_strategy
        self.run_dir = run_dir
        self.data = data
        environment = {**os.environ, TOKEN_VARIABLES[args.hub]: token, 'RANK': '0', 'WORLD_SIZE': '1'}
        self.pusher = Pusher(run_dir, environment, keeps_all=args.push_hub_strategy == 'all_checkpoints')
        self._best: str | None = None

    def _push(self, checkpoint: Path, state: TrainerState) -> None:
        progress = {'step': state.global_step, 'log_history': state.log_history, 'data': self.data}
        try:
            self.pusher.add(stage(self.run_dir, checkpoint, strategy=self.strategy, progress=progress))
        except OSError as error:  # a push must not stop the training
            logger.warning(f'{checkpoint} cannot be pushed, because its files could not be prepared: {error}')

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the new checkpoint to the queue of pushes.

        With the strategy `push_best`, adds the best checkpoint if it changed. With `end`, adds nothing.
        """
        if not state.is_world_process_zero or self.strategy == 'end':
            return
        last = self.run_dir / f'checkpoint-{state.global_step}'
        if self.strategy != 'push_best':
            self._push(last, state)
            return
        best = Path(state.best_model_checkpoint or last)
        if str(best) != self._best:
            self._best = str(best)
            self._push(best, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Push the last checkpoint if the strategy is `end`, then wait until the queue is empty."""
        if not state.is_world_process_zero:
            return
        if self.strategy == 'end':
            self._push(self.run_dir / f'checkpoint-{state.global_step}', state)
        self.pusher.finish()


def push_while_training(args: SftArguments, run_dir: Path, data: dict[str, Any]) -> PushCallback:
    """Return the callback that pushes the checkpoints of a run. The model card shows the numbers of rows in `data`."""
    token = hub.find_token(args.hub_token, args.hub)
    assert token is not None, 'checked before'
    return PushCallback(args, token, run_dir, data)
