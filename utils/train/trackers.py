"""--report_to: passes the log lines of a run to experiment trackers, through the callbacks of transformers.

A tracker gets numbers and settings. It gets no token, no path of the home folder, no user name, no file and no weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from utils.base.errors import ConfigError, error_text
from utils.base.leak_scan import find_secrets
from utils.base.logger import logger
from utils.base.scrub import SOMEONE, USER_VARIABLES, scrubbed, scrubber
from utils.cli.arguments import SftArguments
from utils.cli.trackers import TRACKERS, project_of
from utils.run.folder import Run

if TYPE_CHECKING:
    from utils.train.trainer import SftTrainer

Clean = Callable[[str], str]


class DescribedConfig:
    """The configuration of a model as plain data, without private text."""

    def __init__(self, config: Any, clean: Clean) -> None:
        self._content = scrubbed(config.to_dict(), clean)
        self._json = clean(config.to_json_string())

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary."""
        return copy.deepcopy(self._content)

    def to_json_string(self) -> str:
        """Return the configuration as JSON. Values that equal the default of the class are left out."""
        return self._json


class DescribedModel:
    """The description of a model that a tracker gets: configuration, adapter, layers and size, but no weights."""

    def __init__(self, model: Any, clean: Clean) -> None:
        self.config = DescribedConfig(model.config, clean)
        self.peft_config = None
        if isinstance(model, PeftModel):
            self.peft_config = {name: scrubbed(one.to_dict(), clean) for name, one in model.peft_config.items()}
        self._parameters = int(model.num_parameters())
        self._layers = clean(str(model))

    def num_parameters(self) -> int:
        """Return the number of parameters of the model."""
        return self._parameters

    def __str__(self) -> str:
        return self._layers


def described_arguments(args: TrainingArguments, tracker: str, *, run_name: str, clean: Clean) -> TrainingArguments:
    """Return a copy of the trainer's arguments for a tracker, with the name of the run and without private text."""
    described = copy.copy(args)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, str | dict | list) and field.init:
            setattr(described, field.name, scrubbed(value, clean))
    described.report_to = [tracker]
    described.run_name = run_name
    described.project = project_of(TRACKERS['trackio'], os.environ)
    # A Space of trackio is private, and no second one is made of it after the run.
    described.hub_private_repo = True
    described.trackio_static_space_id = False
    return described


class TrackerCallback(TrainerCallback):
    """Passes the log lines of a run to one tracker. If the tracker fails while the run trains, the run continues."""

    def __init__(self, name: str, make: Callable[[], TrainerCallback], *, run: Run, clean: Clean) -> None:
        self.name = name
        self.run = run
        self._make = make
        self._clean = clean
        # The callback of transformers, or None before the training and after a failure.
        self._callback: TrainerCallback | None = None
        self._handed: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run in the tracker. Raises ConfigError if this fails, e.g. because nobody is logged in."""
        described = described_arguments(args, self.name, run_name=self.run.folder.name, clean=self._clean)
        model = DescribedModel(kwargs['model'], self._clean)
        try:
            with private_environment(self.name, self._clean):
                self._callback = self._make()
                self._callback.on_train_begin(described, state, control, model=model)
        except Exception as error:  # each tracker raises errors of its own
            raise ConfigError(
                f'--report_to {self.name}: the run cannot be opened: {self._error_text(error)}. Log in to the tracker '
                f'or switch it to offline with its own settings, or remove {self.name} from --report_to.'
            ) from error
        self._handed = {'args': described, 'state': state, 'control': control, 'model': model}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass a log line to the tracker."""
        self._pass_on(lambda callback: callback.on_log(**{**self._handed, 'state': state}, logs=dict(logs or {})))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the tracker that the training has ended."""
        self._pass_on(lambda callback: callback.on_train_end(**{**self._handed, 'state': state}))

    def _error_text(self, error: Exception) -> str:
        return self._clean(error_text(error)).rstrip('.')

    def _pass_on(self, event: Callable[[TrainerCallback], object]) -> None:
        """Call `event` with the tracker's callback. After a failure, log a warning and never call the tracker again."""
        if self._callback is None:
            return
        try:
            with private_environment(self.name, self._clean):
                event(self._callback)
        except Exception as error:  # a tracker that fails must not end the run
            self._callback = None
            line = (
                f'--report_to {self.name} failed and gets no more log lines: {self._error_text(error)}. The run '
                'continues, and the curves in its folder are complete.'
            )
            self.run.warnings.append(line)
            logger.warning(line)


@contextlib.contextmanager
def private_environment(name: str, clean: Clean) -> Iterator[None]:
    """A context in which a tracker reads no private values.

    In sys.argv, tokens, the home folder and user names in paths are replaced. The environment variables that name the
    user get the value `user`. Variables that ask the tracker for uploads are removed.

    The first variable in `Tracker.project` is set to the name of the project (see `project_of`), and the others are
    removed. All other variables that the user set for the tracker are not changed.
    """
    tracker = TRACKERS[name]
    changes: dict[str, str | None] = dict.fromkeys((*tracker.uploads, *tracker.project))
    changes |= dict.fromkeys(USER_VARIABLES, SOMEONE)
    changes |= {name: value for name, value in tracker.private.items() if name not in os.environ}
    if tracker.project:
        changes[tracker.project[0]] = project_of(tracker, os.environ)
    before = {name: os.environ.get(name) for name in changes}
    words = sys.argv
    sys.argv = [Path(words[0]).name, *map(clean, words[1:])]
    _set_variables(changes)
    try:
        yield
    finally:
        sys.argv = words
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def add_trackers(trainer: SftTrainer, args: SftArguments, run: Run) -> None:
    """Add a callback to the trainer for each tracker of --report_to. TensorBoard writes to runs/ in the run folder."""
    clean = scrubber(find_secrets(os.environ, {'--hub_token': args.hub_token}))
    for name in args.report_to:
        if name in TRACKERS:
            trainer.add_callback(TrackerCallback(name, _maker(name, run.folder), run=run, clean=clean))


def _maker(name: str, run_dir: Path) -> Callable[[], TrainerCallback]:
    """Return a function that imports the tracker and returns its callback of transformers."""
    (callback,) = get_reporting_integration_callbacks([TRACKERS[name].callback])

    def make() -> TrainerCallback:
        if name == 'tensorboard':
            from torch.utils.tensorboard import SummaryWriter

            return callback(SummaryWriter(run_dir / 'runs'))

        if name == 'swanlab':
            # The callback opens a run only if get_run() returns None, and get_run() of swanlab 0.10 raises instead.
            import swanlab

            swanlab.init(project=os.environ['SWANLAB_PROJ_NAME'], experiment_name=run_dir.name)
        return callback()

    return make
