"""A run in progress: its folder, and the files that are written to the folder before the first step."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.names import LOCK_JSON
from utils.base.system import held_folder
from utils.cli.arguments import InferArguments, SftArguments
from utils.cli.resolution import Decided, Ready, decision, run_name
from utils.loading.new_tokens import TOKENS_FILE
from utils.loading.weights import Weights
from utils.run.lineage import find_lineage
from utils.run.lock import check_repeated, make_lock, read_lock, warn_of_other_scores
from utils.run.new_tokens import find_new_tokens
from utils.run.record import RunRecord, check_resumed, record_of


@dataclass(kw_only=True)
class Run:
    """A run in progress.

    `note` and `decide` assign a new object to `record`. So read `run.record` each time, and keep no reference to it.
    """

    folder: Path
    record: RunRecord
    weights: Weights
    lock: dict[str, Any] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, **facts: Any) -> None:
        """Set fields of the record, and write the record to the run folder. Later checkpoints contain these fields."""
        self._write(replace(self.record, **facts))

    def say(self, line: str) -> None:
        """Log a line, and store it with the decisions of the run."""
        logger.info(line)
        self.decisions.append(line)

    def decide(self, name: str, value: Any, reason: str, *, shown: str | None = None) -> None:
        """Log a decision that is made after the run was opened, and store it in the record.

        The record also keeps the value from before the decision. When the run is resumed, this value is compared with
        the value of the new command. The decided value is not compared, because it depends on the machine. If `shown`
        is given, the log contains `shown` instead of the decided value.
        """
        self.say(decision(name, value if shown is None else shown, reason))
        self._write(self.record.with_decision(name, value))

    def _write(self, record: RunRecord) -> None:
        self.record = record
        if dist.is_main():
            record.write(self.folder)


def open_run(
    done: Ready[SftArguments], weights: Weights, data: dict[str, Any], typed_now: Collection[str] = frozenset()
) -> Run:
    """Return a new run. Rank 0 creates the run folder with sft_args.json and lock.json.

    With --verify true, the folder is a hidden one beside the run folders.

    `data` is the entry `data` of lock.json. `typed_now` has the names of the flags typed for this command, without the
    flags that --from_run adds.

    If the run repeats or resumes an earlier run, or starts from an adapter, it is compared with the earlier run.
    Warnings about differences are logged. Raises ConfigError for a difference that is not allowed, for example if data
    files have changed. `check_repeated`, `check_resumed` and `find_lineage` say which differences these are.
    """
    args = done.args
    logged = len(done.warnings)
    base_model = weights.record(done.info)
    lineage = find_lineage(args, done.info, base_model, done.warnings)
    record = record_of(args, system_typed='system' in done.typed, base_model=base_model)
    record = replace(record, lineage=lineage, added_tokens=find_new_tokens(args))
    lock = make_lock(done, base_model, data, lineage)

    check_repeated(done, lock, typed_now)
    if args.resume_from_checkpoint:
        done.warnings += check_resumed(Path(args.resume_from_checkpoint), record, data)
        resumed = Path(args.resume_from_checkpoint).absolute().parent
        if (resumed / LOCK_JSON).is_file():
            warn_of_other_scores(read_lock(resumed), lock, done.warnings)

    make = _make_hidden_dir if args.verify else make_run_dir
    made = str(make(Path(args.output_dir), run_name(args))) if dist.is_main() else ''
    folder = Path(dist.from_all(made)[0])  # the folder that rank 0 made
    run = Run(
        folder=folder,
        record=record,
        weights=weights,
        lock=lock,
        decisions=done.decisions,
        warnings=done.warnings,
    )
    if dist.is_main():
        record.write(folder)
        write_json(folder / LOCK_JSON, lock)
        if record.added_tokens:
            (folder / TOKENS_FILE).write_text('\n'.join(record.added_tokens) + '\n', encoding='utf-8')

    logger.info(f'run folder: {folder}')
    for line in done.warnings[logged:]:
        logger.warning(line)
    return run


@contextlib.contextmanager
def removed_at_end(folder: Path, *, removes: bool) -> Iterator[None]:
    """A context after which the folder is deleted, if `removes` is True. The main process deletes it."""
    try:
        yield
    finally:
        if removes and dist.is_main():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def in_progress(folder: Path) -> Iterator[None]:
    """A context in which other commands see that the run in this folder is being trained.

    The main process holds a lock on the folder. If the process dies, the system releases the lock. On some systems,
    there is no lock (see `held_folder`).
    """
    with held_folder(folder) if dist.is_main() else contextlib.nullcontext():
        yield


def log_decisions(done: Decided[Any]) -> None:
    """Log each automatic decision with its reason, and each warning."""
    for line in done.decisions:
        logger.info(line)
    for line in done.warnings:
        logger.warning(line)


def make_run_dir(output_dir: Path, name: str) -> Path:
    """Create the folder <output_dir>/<name>/vN-<time>, and return it. N is the highest existing number plus one.

    Raises ConfigError if the folder cannot be created.
    """
    try:
        return _new_run_dir(output_dir / name)
    except OSError as error:
        raise ConfigError(
            f'--output_dir {output_dir} cannot be created or written: {error.strerror}. Give another folder.'
        ) from error


def run_dirs(parent: Path) -> list[Path]:
    """Return the run folders vN-<time> in a folder, the newest (the highest number) first."""
    return [path for _, path in sorted(_numbered(parent), reverse=True)] if parent.is_dir() else []


def _numbered(parent: Path) -> list[tuple[int, Path]]:
    return [(int(m[1]), path) for path in parent.iterdir() if (m := re.match(r'v(\d+)-', path.name))]


def _make_hidden_dir(output_dir: Path, name: str) -> Path:
    """Create a hidden folder next to the run folders, for a run that is not kept, and return it."""
    parent = output_dir / name
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix='.verify-', dir=parent))


def _new_run_dir(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [number for number, _ in _numbered(parent)]
        run_dir = parent / f'v{max(numbers, default=-1) + 1}-{time.strftime("%Y%m%d-%H%M%S")}'
        try:
            run_dir.mkdir()
        except FileExistsError:  # a different run took this number in the same second
            continue
        return run_dir


def result_path(args: InferArguments) -> Path:
    """Return the path of the file for answers, and create its folder.

    If the file of --result_path exists, a warning says that it will be replaced. Without --result_path, the file is
    infer_result.jsonl (check_server.json with --check_server) in the checkpoint, or in output/<model>/untuned. If this
    file exists, the name of the new file gets a number.
    """
    if args.result_path is not None:
        path = Path(args.result_path)
        if path.exists():
            logger.warning(f'--result_path {path} exists and will be replaced.')
    else:
        path = _unused_result_path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _unused_result_path(args: InferArguments) -> Path:
    folder = Path(args.ckpt_dir) if args.ckpt_dir is not None else Path('output') / run_name(args) / 'untuned'
    path = folder / ('infer_result.jsonl' if args.check_server is None else 'check_server.json')
    if not path.exists():
        return path
    numbered = (path.with_stem(f'{path.stem}-{number}') for number in itertools.count(2))
    return next(other for other in numbered if not other.exists())
