"""The folder of a run and what can be read back from it."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.names import LOCK_JSON, SFT_ARGS
from utils.cli.arguments import InferArguments, SftArguments
from utils.cli.resolution import Decided, Ready, decision, run_name
from utils.loading.weights import Weights
from utils.run.lock import check_repeated, make_lock
from utils.run.record import check_resumed, run_record


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way: its folder, what sft_args.json says, where the base weights are, and what was decided."""

    folder: Path
    record: dict[str, Any]
    weights: Weights
    lock: dict[str, Any] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, **facts: Any) -> None:
        """Add facts to what sft_args.json says, in the run folder and in every checkpoint to come."""
        self.record.update(facts)
        if dist.is_main():
            write_json(self.folder / SFT_ARGS, self.record)

    def decide(self, name: str, value: Any, reason: str) -> None:
        """Log and keep a decision made while the run is set up; sft_args.json holds the value used and what was asked.

        What was asked is compared on resuming: it does not depend on the machine.
        """
        line = decision(name, value, reason)
        logger.info(line)
        self.decisions.append(line)
        self.record.setdefault('asked', {}).setdefault(name, self.record.get(name))
        self.note(**{name: value})


def open_run(
    done: Ready[SftArguments], weights: Weights, data: dict[str, Any], typed_now: Collection[str] = frozenset()
) -> Run:
    """Return a new run, its folder made by rank 0 and known to all; logs what it finds out on the way."""
    args = done.args
    logged = len(done.warnings)
    record = run_record(args, system_typed='system' in done.typed, base_model=weights.record(done.info))
    lock = make_lock(done, record['base_model'], data)
    check_repeated(done, lock, typed_now)
    if args.resume_from_checkpoint:
        done.warnings += check_resumed(Path(args.resume_from_checkpoint), record, data)
    made = str(make_run_dir(Path(args.output_dir), run_name(args))) if dist.is_main() else ''
    run = Run(
        folder=Path(dist.from_all(made)[0]),
        record=record,
        weights=weights,
        lock=lock,
        decisions=done.decisions,
        warnings=done.warnings,
    )
    if dist.is_main():
        write_json(run.folder / SFT_ARGS, record)
        write_json(run.folder / LOCK_JSON, lock)
    logger.info(f'run folder: {run.folder}')
    for line in done.warnings[logged:]:
        logger.warning(line)
    return run


def log_decisions(done: Decided[Any]) -> None:
    """Log each automatic decision with its reason, and what the user should know, before anything is fetched."""
    for line in done.decisions:
        logger.info(line)
    for line in done.warnings:
        logger.warning(line)


def make_run_dir(output_dir: Path, name: str) -> Path:
    """Return a new folder <output_dir>/<name>/vN-<time>, N one above the highest there; never an existing one."""
    try:
        return _new_run_dir(output_dir / name)
    except OSError as error:
        raise ConfigError(
            f'--output_dir {output_dir} cannot be made or written: {error.strerror}. Give another folder.'
        ) from error


def _new_run_dir(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(m[1]) for f in parent.iterdir() if (m := re.match(r'v(\d+)-', f.name))]
        run = parent / f'v{max(numbers, default=-1) + 1}-{time.strftime("%Y%m%d-%H%M%S")}'
        try:
            run.mkdir()
        except FileExistsError:  # another run took this number at the same second
            continue
        return run


def result_path(args: InferArguments) -> Path:
    """Return where answers are written: --result_path, else infer_result.jsonl in the checkpoint or under output/.

    Answers that are there already stay, and new ones get the next number; typed, their file is replaced, and said so.
    """
    if args.result_path is not None:
        path = Path(args.result_path)
        if path.exists():
            logger.warning(f'--result_path {path} is there already: it is replaced.')
    elif args.ckpt_dir is not None:
        path = Path(args.ckpt_dir) / 'infer_result.jsonl'
    else:
        path = Path('output') / run_name(args) / 'untuned' / 'infer_result.jsonl'
    if args.result_path is None and path.exists():
        numbered = (path.with_name(f'infer_result-{number}.jsonl') for number in itertools.count(2))
        path = next(other for other in numbered if not other.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
