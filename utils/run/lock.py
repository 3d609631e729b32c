"""Makes and reads lock.json: the command, data, weights and versions of a run. --from_run repeats the run from it."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.errors import ConfigError, Problems
from utils.base.files import Keys, check_keys, read_json
from utils.base.names import LOCK_JSON, TEMPLATE_FLAGS
from utils.base.packages import toolkit, versions
from utils.cli.arguments import SftArguments, flag_types
from utils.cli.parser import Parsed, parse
from utils.cli.resolution import Ready
from utils.cli.scores import own_score, own_words
from utils.data.sources import abbreviated
from utils.loading.chat_template import TEMPLATE_FILE
from utils.loading.new_tokens import TOKENS_FILE
from utils.preprocess import AUTO

# The flags that decide which rows are trained on and which rows are held out.
DATA_FLAGS = (
    'dataset', 'val_dataset', 'columns', 'text_rows', 'dataset_seed', 'dataset_test_ratio', 'train_dataset_sample',
    'streaming', 'stream_val_rows',
)  # fmt: skip
# --verify true repeats this many steps if --max_steps is not typed.
_VERIFIED_STEPS = 20
# Flags that are never recorded: --hub_token is secret, and --from_run only names the run that was repeated.
_NOT_REPEATED = ('hub_token', 'from_run', 'verify')
# The types of the entries of lock.json that are compared with those of another run.
_HASHED = (None, {'sha256': str | None})
_LOCK_KEYS: Keys = {
    'base_model': _HASHED,
    'data': (None, {'*': {'sha256': str | None, 'rows': int | None, 'flag': str | None, 'commit': str | None}}),
    'adapter': _HASHED,
    'chat_template': _HASHED,
    'scores': (None, {'*': str}),
    'versions': dict | None,
    'machine': dict | None,
    'toolkit': (None, {'version': str, 'commit': str | None}),
    'template_sha256': str | None,
    'timetable': (None, [{'steps': int, 'first': int, 'position': float, 'last': int, 'end': int}]),
}


def recorded(flags: Mapping[str, Any], name: str) -> Any:
    """Return the value of a flag in a record. If the record is older than the flag, return the default."""
    return flags.get(name, next(f.default for f in fields(SftArguments) if f.name == name))


def typed_words(done: Ready[SftArguments], *without: str) -> list[str]:
    """Return the typed flags and their values as words of a command line.

    The flags of the run in --from_run count as typed. --hub_token, --from_run, --verify and the flags in `without` are
    left out.
    """
    words: list[str] = []
    for name in flag_types(SftArguments):
        value = getattr(done.args, name)
        # A typed flag is None only if it was decided so, e.g. if --resume_from_checkpoint last finds no checkpoint.
        if name in done.typed and name not in (*_NOT_REPEATED, *without) and value is not None:
            words += flag_words(name, value)
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


def make_lock(
    done: Ready[SftArguments], base_model: dict[str, str], data: dict[str, Any], lineage: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the content of lock.json. The hash of the template is added later, when the tokenizer is open.

    `lineage` describes the adapter from which the run starts. It is None without such an adapter.
    """
    scored = done.args.score if done.args.predict_with_generate else []
    lock = {
        'command': typed_words(done),
        # The folder in which the command was started. Relative paths in the command start at this folder.
        'directory': abbreviated(Path.cwd()),
        'processes': dist.world_size(),
        'base_model': base_model,
        'data': data,
        # {word of --score: sha256 of its file} for each function of a file.
        'scores': {word: _sha256_of_score(word) for word in own_words(scored)},
        'versions': versions(),
        'toolkit': toolkit(),
        'machine': _machine(),
    }
    return lock if lineage is None else {**lock, 'adapter': lineage}


def _machine() -> dict[str, Any]:
    """Return the properties of the machine that can change rounding: processor, instruction set, threads, CUDA GPUs."""
    import torch

    cuda = torch.cuda
    return {
        'processor': _processor(),
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'threads': torch.get_num_threads(),
        'gpus': [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else [],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def _sha256_of_score(word: str) -> str:
    own = own_score(word)
    assert own is not None, 'only called for functions of files'
    return hashlib.sha256(own.file.read_bytes()).hexdigest()


def warn_of_other_scores(then: dict[str, Any], now: dict[str, Any], warnings: list[str]) -> None:
    """Add a warning for each function of --score that two runs have in common and whose file has changed.

    `then` and `now` are the contents of the two lock.json files.
    """
    earlier = then.get('scores') or {}
    for word, sha256 in now['scores'].items():
        if earlier.get(word, sha256) != sha256:
            warnings.append(
                f'--score {word}: the file has changed since the earlier run (sha256 {earlier[word][:12]} then and '
                f'{sha256[:12]} now), so the scores may differ.'
            )


def read_lock(run_dir: Path) -> dict[str, Any]:
    """Return the content of lock.json in a run folder. Raises ConfigError if the file is missing or damaged."""
    remedy = 'Give --from_run a run folder, output/<model>/vN-<time>.'
    needed = {'command': list[str], 'processes': int, 'base_model': dict, 'data': dict, 'versions': dict}
    lock = read_compared(run_dir, remedy=remedy)
    check_keys(lock, needed, str(run_dir / LOCK_JSON), remedy=remedy)
    return lock


def read_compared(run_dir: Path, *, remedy: str = 'Put back the file that the run wrote.') -> dict[str, Any]:
    """Return the content of lock.json in a run folder. Entries that older versions did not write may be missing.

    Raises ConfigError with `remedy` if the file is missing or damaged, or if an entry has the wrong type.
    """
    lock: dict[str, Any] = read_json(run_dir / LOCK_JSON, keys=_LOCK_KEYS, remedy=remedy)
    return lock


def repeat(parsed: Parsed[SftArguments], words: Sequence[str]) -> Parsed[SftArguments]:
    """Return the command line to run. With --from_run, it has the flags of that run, overridden by the flags typed now.

    `words` is the command line typed now, and `parsed` is its parsed form. Without --from_run, `parsed` is returned. If
    lock.json cannot be read, a problem is added to `parsed`, and `parsed` is returned. With --verify true, a typed
    --max_steps does not override the flag of that run.
    """
    if parsed.args.from_run is None:
        return parsed
    try:
        lock = read_lock(Path(parsed.args.from_run))
    except ConfigError as error:
        parsed.problems.add(error.problems[0])
        return parsed
    earlier = _with_kept_files(lock['command'], Path(parsed.args.from_run), parsed)
    verified = _without(words, 'max_steps') if parsed.args.verify else words
    whole = parse(SftArguments, verified, program='llm_sft.py', about='', earlier=earlier)
    if 'score' not in parsed.typed and own_words(whole.args.score):
        typed = ' '.join(whole.args.score)
        whole.problems.add(
            f'--from_run {parsed.args.from_run}: the run used a score function from a file of the user. Such a '
            f'function is only executed if this command names it. Add --score {typed}.'
        )
    if parsed.args.verify:  # --max_steps is the number of steps to verify, and the schedule stays that of the run
        _check_verification(parsed, whole.problems)
    return whole


def _check_verification(parsed: Parsed[SftArguments], problems: Problems) -> None:
    """Check the flags of a command with --verify true.

    `parsed` is the command line as the user typed it, without the flags of the run in --from_run. `problems` gets the
    problems of `parsed`, and one problem for each typed flag that contradicts --verify true.
    """
    for problem in parsed.problems.found:
        problems.add(problem)
    if steps_to_verify(parsed) < 1:
        problems.add(f'--verify true: --max_steps takes 1 or more, got {parsed.args.max_steps}.')
    if 'resume_from_checkpoint' in parsed.typed:
        problems.add(
            '--verify true repeats the first steps of a run, so it cannot start at a later checkpoint. Remove '
            '--resume_from_checkpoint.'
        )


def steps_to_verify(parsed: Parsed[SftArguments]) -> int:
    """Return the number of steps that a command with --verify true repeats from an earlier run.

    If --max_steps is typed, the value of --max_steps is returned. Otherwise, a default is returned. `parsed` is the
    typed command line, without the flags of the earlier run.
    """
    return parsed.args.max_steps if 'max_steps' in parsed.typed else _VERIFIED_STEPS


def _with_kept_files(command: Sequence[str], run_dir: Path, parsed: Parsed[SftArguments]) -> list[str]:
    """Return `command` with the files of --chat_template and --new_tokens replaced by their copies in `run_dir`.

    A file is replaced only if `command` has the flag and the copy exists.

    `command` is the command of the run in --from_run, and `run_dir` is its folder. The original files may have been
    moved or changed since that run. The copy of the template includes --template_settings.

    `parsed` is the command line typed now. If it has a --template_type other than auto, the flags that choose the
    template are removed from `command`.
    """
    earlier = parse(SftArguments, command, program='llm_sft.py', about='')
    kept = list(command)
    if earlier.args.new_tokens is not None and (run_dir / TOKENS_FILE).is_file():
        kept = [*_without(command, 'new_tokens'), *flag_words('new_tokens', str(run_dir / TOKENS_FILE))]
    if parsed.args.template_type not in (None, AUTO):
        return _without(kept, *TEMPLATE_FLAGS)
    if earlier.args.chat_template is None or not (run_dir / TEMPLATE_FILE).is_file():
        return kept
    return [*_without(kept, 'chat_template'), *flag_words('chat_template', str(run_dir))]


def _without(command: Sequence[str], *names: str) -> list[str]:
    """Return the words of a command without these flags and their values."""
    kept = []
    skips = False
    for word in command:
        if word.startswith('--'):
            skips = word[2:].partition('=')[0] in names
        if not skips:
            kept.append(word)
    return kept


def check_repeated(done: Ready[SftArguments], lock: dict[str, Any], typed_now: Collection[str]) -> None:
    """Compare `lock`, the lock.json content of this run, with lock.json of the run in --from_run, if there is one.

    Raises ConfigError if the data, the base weights or the weights of --adapter differ. Adds a warning to `done` if a
    version, the machine, the number of processes or a file of --score differs.

    Data are not compared if a data flag is typed now. Base weights are not compared if a model flag is typed now, and
    the adapter is not compared if --adapter is typed now. With --verify true, all of them are compared.
    """
    if done.args.from_run is None:
        return
    earlier = read_lock(Path(done.args.from_run))
    if done.args.verify:
        typed_now = ()

    def compare(what: str, then: dict[str, Any], now: dict[str, Any], *, flag: str, note: str = '') -> None:
        remedy = '' if done.args.verify else f', or type {flag} to use the present ones'
        _compare(problems, what, then, now, remedy=remedy, note=note)

    problems = Problems()
    if not {'model_type', 'model_id_or_path', 'model_revision'} & set(typed_now):
        compare('the base weights', earlier['base_model'], lock['base_model'], flag='--model_id_or_path')
    if 'adapter' not in typed_now:
        then = earlier.get('adapter') or {}
        compare('the weights of the adapter', then, lock.get('adapter') or {}, flag='--adapter')
    if not set(DATA_FLAGS) & set(typed_now):
        for source in sorted({*earlier['data'], *lock['data']}):
            then = earlier['data'].get(source, {})
            now = lock['data'].get(source, {})
            note = _commit_then(source, then, now)
            compare(f'the rows of {source}', then, now, flag=f'--{_flag_of(then, now)}', note=note)
    problems.raise_if_any()

    warn_of_other_scores(earlier, lock, done.warnings)
    done.warnings += [f'{change}: the numbers may differ.' for change in changes_since(earlier, lock)]
    if earlier['processes'] != lock['processes']:
        done.warnings.append(
            f'{lock["processes"]} processes train, the repeated run had {earlier["processes"]}: '
            'the total batch size may differ.'
        )


def changes_since(earlier: dict[str, Any], lock: dict[str, Any]) -> list[str]:
    """Return lines for the differences of two lock.json files: versions, properties of the machine, and this toolkit.

    `earlier` is the lock.json of the original run, and `lock` that of the run that repeats it. If `earlier` has no
    entry for versions, machine or toolkit, this entry is not compared.
    """
    lines = []
    for part in ('versions', 'machine'):
        then = earlier.get(part)
        now = lock[part]
        if then is None:
            continue
        for name in sorted({*then, *now}):
            if now.get(name) != then.get(name):
                lines.append(f'{name} is {now.get(name)}, the repeated run had {then.get(name)}')
    made_by = earlier.get('toolkit') or lock['toolkit']
    if made_by != lock['toolkit']:
        lines.append(f'this toolkit is {described(lock["toolkit"])}, the repeated run was made by {described(made_by)}')
    return lines


def check_same_data(
    checkpoint: Path, now: dict[str, Any], problems: Problems, *, remedy: str, only: Collection[str] | None = None
) -> list[str]:
    """Add a problem for each data set whose rows have changed since the checkpoint was trained.

    The run folder is the parent folder of `checkpoint`. The file lock.json in the run folder records the rows of the
    run. `now` is the record of the present rows, for example {'a.jsonl': {'rows': 100, 'sha256': 'e3b0...'}}. If `only`
    is given, only the data sets in `only` are compared. `remedy` is the end of the message, for example 'type --dataset
    to answer all rows'.

    If the run folder has no lock.json, nothing can be compared, and [warning] is returned. Otherwise, [] is returned.
    Raises ConfigError if lock.json is damaged.
    """
    file = checkpoint.absolute().parent / LOCK_JSON
    if not file.is_file():
        return [f'{file} is missing, so the data cannot be compared with the data of the run.']
    then = read_compared(file.parent).get('data') or {}
    for source in sorted({*then, *now} if only is None else only):
        had = then.get(source, {})
        has = now.get(source, {})
        if had.get('sha256') != has.get('sha256'):
            problems.add(
                f'--{_flag_of(had, has)} {source}: the rows have changed since {checkpoint.name} was trained: '
                f'{had.get("rows", 0)} rows then (sha256 {str(had.get("sha256"))[:12]}), {has.get("rows", 0)} rows now '
                f'(sha256 {str(has.get("sha256"))[:12]}). Put the data back, or {remedy}.'
                f'{_commit_then(source, had, has)}'
            )
    return []


def _flag_of(*entries: dict[str, Any]) -> str:
    """Return the flag that names a data set: 'dataset' or 'val_dataset'.

    `entries` are entries of lock.json for this data set. If an entry has the key `flag`, its value is returned,
    otherwise 'dataset'.
    """
    return next((entry['flag'] for entry in entries if 'flag' in entry), 'dataset')


def _commit_then(source: str, then: dict[str, Any], now: dict[str, Any]) -> str:
    """Return a sentence that names the earlier commit, if a hub serves a different commit now. Returns '' otherwise."""
    commit = then.get('commit')
    if not commit or commit == now.get('commit'):
        return ''
    # Names of registered data sets contain no slash, and take no revision.
    word = source.removesuffix(' (validation)')
    remedy = f' Its rows are --dataset {word}@{commit}.' if '/' in word and '@' not in word else ''
    return f' The hub served commit {commit[:12]} then.{remedy}'


def described(found: dict[str, Any]) -> str:
    """Return version and commit of a toolkit as text. It ends with 'with changes' if files differ from the commit.

    `found` is the entry `toolkit` of a lock.json or run.json.
    """
    commit = f' at {found["commit"][:12]}' if 'commit' in found else ''
    return f'{found["version"]}{commit}' + (' with changes' if found.get('changed_since') else '')


def check_repeated_template(run_dir: Path, sha256: str) -> None:
    """Raise ConfigError if the run in --from_run recorded a different hash of its template than `sha256`."""
    trained = read_lock(run_dir).get('template_sha256')
    if trained not in (None, sha256):
        raise ConfigError(
            f'--from_run {run_dir}: the template has changed since that run (its sha256 was '
            f'{trained[:12]}, now it is {sha256[:12]}). '
            'Put the old template back, or type which template to train with now, e.g. --template_type auto.'
        )


def _compare(
    problems: Problems, what: str, then: dict[str, Any], now: dict[str, Any], *, remedy: str, note: str = ''
) -> None:
    if then.get('sha256') != now.get('sha256'):
        has_rows = 'rows' in then or 'rows' in now
        counts = f', {then.get("rows", 0)} then and {now.get("rows", 0)} now' if has_rows else ''
        problems.add(
            f'--from_run: {what} have changed since that run (sha256 {str(then.get("sha256"))[:12]} then and '
            f'{str(now.get("sha256"))[:12]} now{counts}). Restore the earlier ones{remedy}.{note}'
        )
