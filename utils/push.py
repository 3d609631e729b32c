"""Checkpoints on their way to a hub while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils import hub
from utils.argument import SftArguments
from utils.logger import logger


class PushCallback(TrainerCallback):
    """Pushes by --push_hub_strategy. A hub that fails is reported and never stops the training."""

    def __init__(self, args: SftArguments, token: str) -> None:
        self.repo = str(args.hub_model_id)
        self.private = args.hub_private_repo
        self.strategy = args.push_hub_strategy
        self._token = token
        self._pushed: str | None = None

    def _push(self, checkpoint: str, *, into: str = '') -> None:
        try:
            hub.push_folder(
                Path(checkpoint),
                repo=self.repo,
                token=self._token,
                private=self.private,
                message=f'Upload {Path(checkpoint).name}',
                path_in_repo=into,
            )
        except Exception as error:  # the training is worth more than the push
            logger.warning(f'{checkpoint} could not be pushed to {self.repo}: {type(error).__name__}: {error}')
            return
        self._pushed = checkpoint
        logger.info(f'pushed {checkpoint} to {self.repo}')

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push what the strategy promises at each checkpoint."""
        if not state.is_world_process_zero:
            return
        last = f'{args.output_dir}/checkpoint-{state.global_step}'
        best = state.best_model_checkpoint or last
        if self.strategy == 'push_last':
            self._push(last)
        elif self.strategy == 'push_best' and best != self._pushed:
            self._push(best)
        elif self.strategy == 'checkpoint':
            self._push(last, into='last-checkpoint')
        elif self.strategy == 'all_checkpoints':
            self._push(last, into=Path(last).name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Push the last checkpoint where the strategy is `end`."""
        if state.is_world_process_zero and self.strategy == 'end':
            self._push(f'{args.output_dir}/checkpoint-{state.global_step}')
