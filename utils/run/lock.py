"""Writes and reads lock.json: the command, data, weights and versions of a run. --from_run repeats the run from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.errors import ConfigError, Problems
from utils.base.files import read_json
from utils.base.names import LOCK_JSON
from utils.base.packages import toolkit, versions
from utils.cli.arguments import SftArguments, flag_types
from utils.cli.parser import Parsed, parse
from utils.cli.resolution import Ready
from utils.data.sources import abbreviated

# The flags that decide which rows are trained on and which rows are held out.
DATA_FLAGS = ('dataset', 'dataset_seed', 'dataset_test_ratio', 'train_dataset_sample', 'streaming', 'stream_val_rows')
# Flags that are never recorded: --hub_token is secret, and --from_run only names the run that was repeated.
_NOT_REPEATED = ('hub_token', 'from_run')


def typed_words(done: Ready[SftArguments], *without: str) -> list[str]:
    """Return the typed flags and their values as words of a command line, except secrets and the flags in `without`."""
    words: list[str] = []
    for name in flag_types(SftArguments):
        if name in done.typed and name not in (*_NOT_REPEATED, *without):
            words += flag_words(name, getattr(done.args, name))
    return words


def flag_words(name: str, value: Any) -> list[str]:
    """Return a flag and its value as words of a command line.

    If a value starts with -, the flag and the value are joined with = into one word.
    """
    values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, bool):
        values = [str(value).lower()]
    if any(word.startswith('-') for word in values):
        return [f'--{name}={",".join(values)}']  # only lists have several values, and no list item contains a comma
    return [f'--{name}', *values]


def make_lock(done: Ready[SftArguments], base_model: dict[str, str], data: dict[str, Any]) -> dict[str, Any]:
    """Return the content of lock.json. The hash of the template is added later, when the tokenizer is open."""
    return {
        'command': typed_words(done),
        # The folder in which the command was started. Relative paths in the command start at this folder.
        'directory': abbreviated(Path.cwd()),
        'processes': dist.world_size(),
        'base_model': base_model,
        'data': data,
        'versions': versions(),
        'toolkit': toolkit(),
    }


def read_lock(run_dir: Path) -> dict[str, Any]:
    """Return the content of lock.json in a run folder. Raises ConfigError if the file is missing or damaged."""
    remedy = 'Give --from_run a run folder, output/<model>/vN-<time>.'
    lock: dict[str, Any] = read_json(run_dir / LOCK_JSON, remedy=remedy)
    kinds = {'command': list, 'processes': int, 'base_model': dict, 'data': dict, 'versions': dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(lock.get(name), kind)]:
        raise ConfigError(f'{run_dir / LOCK_JSON}: {wrong[0]} is missing or has the wrong type. {remedy}')
    return lock


def repeat(parsed: Parsed[SftArguments], words: Sequence[str]) -> Parsed[SftArguments]:
    """Return the command line to run: with --from_run, the flags of that run, overridden by the flags typed now.

    `words` is the command line typed now, and `parsed` is its parsed form. Without --from_run, `parsed` is returned. If
    lock.json cannot be read, `parsed` is returned with a problem.
    """
    if parsed.args.from_run is None:
        return parsed
    try:
        lock = read_lock(Path(parsed.args.from_run))
    except ConfigError as error:
        parsed.problems.add(error.problems[0])
        return parsed
    return parse(SftArguments, words, program='llm_sft.py', about='', earlier=lock['command'])


def check_repeated(done: Ready[SftArguments], lock: dict[str, Any], typed_now: Collection[str]) -> None:
    """Compare `lock`, the lock.json content of this run, with lock.json of the run in --from_run, if there is one.

    Raises ConfigError if data or weights differ. Adds a warning for each version that differs. Data are not compared if
    a data flag is typed now. Weights are not compared if a model flag is typed now.
    """
    if done.args.from_run is None:
        return
    earlier = read_lock(Path(done.args.from_run))

    problems = Problems()
    if not {'model_type', 'model_id_or_path', 'model_revision'} & set(typed_now):
        _compare(problems, 'the base weights', earlier['base_model'], lock['base_model'], remedy='--model_id_or_path')
    if 'adapter' not in typed_now:
        _compare(
            problems,
            'the weights of the adapter',
            earlier.get('adapter') or {},
            lock.get('adapter') or {},
            remedy='--adapter',
        )
    if 'new_tokens' not in typed_now and earlier.get('new_tokens') != lock.get('new_tokens'):
        problems.add(
            '--from_run: the tokens of --new_tokens are not those of the repeated run. Put the file back, or type '
            '--new_tokens to train on what is there now.'
        )
    if not set(DATA_FLAGS) & set(typed_now):
        for source in sorted({*earlier['data'], *lock['data']}):
            then = earlier['data'].get(source, {})
            now = lock['data'].get(source, {})
            _compare(problems, f'the rows of {source}', then, now, remedy='--dataset')
    problems.raise_if_any()

    for name in sorted({*earlier['versions'], *lock['versions']}):
        then = earlier['versions'].get(name)
        now = lock['versions'].get(name)
        if now != then:
            done.warnings.append(f'{name} is {now}, the repeated run had {then}: the numbers may differ.')
    if earlier.get('toolkit', lock['toolkit']) != lock['toolkit']:
        done.warnings.append(
            f'this toolkit is {described(lock["toolkit"])}, the repeated run was made by '
            f'{described(earlier["toolkit"])}: the numbers may differ.'
        )
    if earlier['processes'] != lock['processes']:
        done.warnings.append(
            f'{lock["processes"]} processes train, the repeated run had {earlier["processes"]}: '
            'the total batch size differs.'
        )


def check_same_data(checkpoint: Path, now: dict[str, Any], problems: Problems, *, remedy: str) -> list[str]:
    """Add a problem for each data set whose rows differ from the rows of the run that wrote the checkpoint.

    Returns a list of warnings. It has one warning if the run folder has no lock.json: then nothing can be compared.
    """
    file = checkpoint.absolute().parent / LOCK_JSON
    if not file.is_file():
        return [f'{file} is missing, so the data cannot be compared with the data of the run.']
    then = read_json(file, remedy='Put back the file that the run wrote.').get('data') or {}
    for source in sorted({*then, *now}):
        had = then.get(source, {})
        has = now.get(source, {})
        if had.get('sha256') != has.get('sha256'):
            problems.add(
                f'--dataset {source}: its rows are not those that {checkpoint.name} was trained with (sha256 '
                f'{str(had.get("sha256"))[:12]}, now {str(has.get("sha256"))[:12]}, {had.get("rows", 0)} rows then and '
                f'{has.get("rows", 0)} now). Put the data back, {remedy}.'
            )
    return []


def described(found: dict[str, Any]) -> str:
    """Return version and commit of a toolkit as text. It ends with 'with changes' if files differ from the commit.

    `found` is the entry `toolkit` of a lock.json or run.json.
    """
    commit = f' at {found["commit"][:12]}' if 'commit' in found else ''
    return f'{found["version"]}{commit}' + (' with changes' if found.get('changed_since') else '')


def check_repeated_template(run_dir: Path, sha256: str) -> None:
    """Raise ConfigError if the run in --from_run used a template with a different hash than `sha256`."""
    trained = read_lock(run_dir).get('template_sha256')
    if trained not in (None, sha256):
        raise ConfigError(
            f'--from_run {run_dir}: the template has changed since (sha256 {trained[:12]}, now {sha256[:12]}). '
            'Put the old template back, or type --template_type to train with the present template.'
        )


def _compare(problems: Problems, what: str, then: dict[str, Any], now: dict[str, Any], *, remedy: str) -> None:
    if then.get('sha256') != now.get('sha256'):
        has_rows = 'rows' in then or 'rows' in now
        counts = f', {then.get("rows", 0)} then and {now.get("rows", 0)} now' if has_rows else ''
        problems.add(
            f'--from_run: {what} are not those of the repeated run (sha256 {str(then.get("sha256"))[:12]}, now '
            f'{str(now.get("sha256"))[:12]}{counts}). Put them back, or type {remedy} to train on what is there now.'
        )
