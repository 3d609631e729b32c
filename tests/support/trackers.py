"""Stand-ins for the packages of experiment trackers. They write all that they are given to one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDS = 'recorded.jsonl'

RECORDER = '''
import getpass, json, os, sys
from pathlib import Path

FILE = Path(__file__).with_name('recorded.jsonl')
WATCHED = ('WANDB_', 'SWANLAB_', 'MLFLOW_', 'HF_MLFLOW_', 'TRACKIO_', 'COMET_')


def plain(value, depth=8):
    """Return the value as JSON data, with the attributes of objects of any class."""
    if value is None or isinstance(value, (bool, int, float, str)) or depth == 0:
        return value if depth else repr(value)
    if isinstance(value, dict):
        return {str(key): plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item, depth - 1) for item in value]
    return [str(value), plain(getattr(value, '__dict__', {}), depth - 1)]


class Recorder:
    """Any attribute is a recorder. A call is written to the file, and returns a recorder."""

    def __init__(self, name):
        self.__dict__['name'] = name

    def __getattr__(self, name):
        if name.startswith('__') and not name.startswith('__internal_api__'):
            raise AttributeError(name)
        return Recorder(f'{self.__dict__["name"]}.{name}')

    def __call__(self, *args, **kwargs):
        if self.__dict__['name'] == os.environ.get('FAILING_CALL'):
            raise RuntimeError(f'no connection for {os.environ["HOME"]}.')
        line = {'call': self.__dict__['name'], 'args': plain(args), 'kwargs': plain(kwargs), 'argv': sys.argv,
                'user': getpass.getuser(), 'pid': os.getpid(),
                'variables': sorted(name for name in os.environ if name.startswith(WATCHED))}
        with FILE.open('a') as file:
            file.write(json.dumps(line) + chr(10))
        return Recorder(self.__dict__['name'] + '()')

    def __setitem__(self, key, value):
        self.__getattr__('set')(key, value)

    def __getitem__(self, key):
        return self.__getattr__(str(key))
'''

# The files of the stand-ins: those parts of each package that the callbacks of transformers use.
FILES = {
    'wandb/__init__.py': """
from stand_in import Recorder
_all = Recorder('wandb')
run = None
config, log, summary, define_metric = _all.config, _all.log, _all.summary, _all.define_metric
watch, Artifact, log_artifact, termwarn = _all.watch, _all.Artifact, _all.log_artifact, _all.termwarn

def init(**kwargs):
    global run
    _all.init(**kwargs)
    run = _all.run
""",
    'wandb/sdk/__init__.py': '',
    'wandb/sdk/lib/__init__.py': '',
    'wandb/sdk/lib/config_util.py': 'class ConfigError(Exception): pass\n',
    'swanlab/__init__.py': """
from stand_in import Recorder
_all = Recorder('swanlab')
_run = None
config, log = _all.config, _all.log

def init(**kwargs):
    global _run
    _run = _all.init(**kwargs)

def get_run():
    if _run is None:
        raise RuntimeError('No active Run.')
    return _run
""",
    'trackio/__init__.py': """
from stand_in import Recorder
_all = Recorder('trackio')
__version__ = '0.43.0'
init, config, log, finish, freeze = _all.init, _all.config, _all.log, _all.finish, _all.freeze
context_vars = _all.context_vars
""",
    'mlflow/__init__.py': """
from stand_in import Recorder
from mlflow import utils
_all = Recorder('mlflow')
__version__ = '3.17.2'
_active = None
set_experiment, log_params, log_metrics = _all.set_experiment, _all.log_params, _all.log_metrics
set_tags, set_tracking_uri, pyfunc = _all.set_tags, _all.set_tracking_uri, _all.pyfunc

def is_tracking_uri_set():
    return False

def active_run():
    return _active

def start_run(**kwargs):
    global _active
    _active = _all.start_run(**kwargs)

def end_run():
    global _active
    _all.end_run()
    _active = None
""",
    'mlflow/utils/__init__.py': 'from mlflow.utils import validation\n',
    'mlflow/utils/validation.py': 'MAX_PARAM_VAL_LENGTH = 6000\nMAX_PARAMS_TAGS_PER_BATCH = 100\n',
    'comet_ml/__init__.py': """
from stand_in import Recorder
_all = Recorder('comet_ml')
ExperimentConfig, start = _all.ExperimentConfig, _all.start

class config:
    # transformers asks for the key when it is imported.
    get_config = staticmethod(lambda name: 'a key')
""",
    # transformers asks for the version of the package.
    'comet_ml-3.58.8.dist-info/METADATA': 'Metadata-Version: 2.1\nName: comet_ml\nVersion: 3.58.8\n',
}


def write_stand_ins(folder: Path) -> Path:
    """Write the stand-ins to a folder, for the search path of Python. Returns the folder."""
    for name, content in {'stand_in.py': RECORDER, **FILES}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding='utf-8')
    return folder


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return what the stand-ins of a folder were given: one entry for each call, in order."""
    file = folder / RECORDS
    return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()] if file.is_file() else []


def calls(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the entries of the calls with this name, e.g. wandb.log."""
    return [entry for entry in recorded(folder) if entry['call'] == name]
