"""The experiment trackers of --report_to: their names, packages, and environment variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from utils.base.errors import Problems, did_you_mean
from utils.base.packages import has_package
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Resolution

NONE = 'none'
# The project in which a tracker shows the runs, if the variable of the tracker does not name one.
DEFAULT_PROJECT = 'assay'
_OFF = ('', '0', 'false')


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A tracker: its Python module, the name of its package, and its name in transformers."""

    module: str
    package: str
    callback: str
    # The variable of the tracker that names the project, then other variables that may name it.
    project: tuple[str, ...] = ()
    # Variables that make the callback of transformers upload weights or files.
    uploads: tuple[str, ...] = ()
    # Settings of the tracker that keep the command line, the folders and the output of the terminal private.
    private: Mapping[str, str] = field(default_factory=dict)


TRACKERS = {
    'tensorboard': Tracker(module='tensorboard', package='tensorboard', callback='tensorboard'),
    'wandb': Tracker(
        module='wandb',
        package='wandb',
        callback='wandb',
        project=('WANDB_PROJECT',),
        uploads=('WANDB_LOG_MODEL', 'WANDB_WATCH'),
        private={
            'WANDB_X_DISABLE_META': 'true',
            'WANDB_CONSOLE': 'off',
            'WANDB_DISABLE_GIT': 'true',
            'WANDB_DISABLE_CODE': 'true',
        },
    ),
    'swanlab': Tracker(
        module='swanlab',
        package='swanlab',
        callback='swanlab',
        # transformers names SWANLAB_PROJECT, which swanlab 0.10 cannot read.
        project=('SWANLAB_PROJ_NAME', 'SWANLAB_PROJECT'),
        uploads=('SWANLAB_LOG_MODEL',),
        private={
            'SWANLAB_PROBE_RUNTIME': 'false',
            'SWANLAB_PROBE_GIT': 'false',
            'SWANLAB_PROBE_SWANLAB': 'false',
            'SWANLAB_TERMINAL_PROXY_TYPE': 'none',
        },
    ),
    'mlflow': Tracker(
        module='mlflow',
        package='mlflow',
        callback='mlflow',
        project=('MLFLOW_EXPERIMENT_NAME',),
        uploads=('HF_MLFLOW_LOG_ARTIFACTS',),
    ),
    'trackio': Tracker(
        module='trackio',
        package='trackio',
        callback='trackio',
        project=('TRACKIO_PROJECT',),
    ),
    'comet': Tracker(
        module='comet_ml',
        package='comet-ml',
        callback='comet_ml',
        project=('COMET_PROJECT_NAME',),
        uploads=('COMET_LOG_ASSETS',),
        private={
            'COMET_AUTO_LOG_CLI_ARGUMENTS': 'false',
            'COMET_AUTO_LOG_ENV_DETAILS': 'false',
            'COMET_AUTO_LOG_GIT_METADATA': 'false',
            'COMET_AUTO_LOG_GIT_PATCH': 'false',
            'COMET_AUTO_LOG_CODE': 'false',
            'COMET_AUTO_LOG_OUTPUT_LOGGER': '',  # any text would name a kind of logger
        },
    ),
}


def project_of(tracker: Tracker, environment: Mapping[str, str]) -> str:
    """Return the project name: the first value set in the variables `tracker.project`, else DEFAULT_PROJECT."""
    return next((environment[name] for name in tracker.project if environment.get(name)), DEFAULT_PROJECT)


def resolve_trackers(done: Resolution[SftArguments]) -> None:
    """Add a problem for each unknown tracker, and for `none` together with a tracker. Removes repeated names."""
    names = list(dict.fromkeys(done.args.report_to))
    known = [*TRACKERS, NONE]
    for name in names:
        if name not in known:
            done.problems.add(f"--report_to '{name}' is not known{did_you_mean(name, known)} Use {', '.join(known)}.")
    if NONE in names and len(names) > 1:
        others = ' '.join(name for name in names if name != NONE)
        done.problems.add(
            f"--report_to {' '.join(names)}: 'none' cannot be combined with a tracker. Use --report_to {others} to "
            'log to a tracker, or --report_to none to use no tracker.'
        )
    done.args.report_to = names


def check_tracker_packages(names: Sequence[str], problems: Problems) -> None:
    """Add one problem if packages of the named trackers are missing. Its message has the command that installs them."""
    missing = [name for name in names if name in TRACKERS and not has_package(TRACKERS[name].module)]
    if missing:
        packages = ' '.join(TRACKERS[name].package for name in missing)
        problems.add(f'--report_to {" ".join(missing)}: not installed. Run: pip install {packages}')


def variables_without_effect(names: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each environment variable that asks a tracker of `names` to upload weights or files.

    Such a variable has no effect here, because a tracker only gets numbers and settings.
    """
    for name in names:
        for variable in TRACKERS[name].uploads if name in TRACKERS else ():
            if environment.get(variable, '').lower() not in _OFF:
                yield (
                    f'the variable {variable} has no effect: a tracker gets numbers and settings, no files and no '
                    'weights. To publish weights, use --push_to_hub true.'
                )
