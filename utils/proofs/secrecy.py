"""Check that a run folder has no access token, no pickle, and no path of the home folder.

Paths that were typed on the command line are allowed.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.base.checkpoint import PICKLE_SUFFIXES
from utils.base.leak_scan import find_secrets, scan_tree
from utils.base.logger import logger
from utils.cli.arguments import SftArguments, without_amount
from utils.run.record import record_proof

# Files that DeepSpeed writes. What is found in them is only listed in proofs.json and does not fail the check.
_DEEPSPEED = re.compile(r'checkpoint-\d+/global_step\d+/')
# A path that follows one of these bytes begins earlier.
_IN_PATH = re.compile(rb'[\w/]')


def home_paths(folder: Path, home: Path, typed: Iterable[str]) -> Iterator[str]:
    """Yield a message for each file in the folder whose content has a path inside `home`.

    A path is allowed if it begins with one of the paths in `typed`.
    """
    if home == home.parent:
        return

    # A pattern that begins with fixed text is searched several times as fast as one with a lookbehind.
    inside = re.compile(re.escape(os.fsencode(home)) + rb'/')
    rest = re.compile(rb'[^\s"\'<>\\,;)\]]*')
    known = tuple(os.fsencode(word) for word in typed)

    def paths(data: mmap.mmap) -> Iterator[bytes]:
        for match in inside.finditer(data):
            before = data[max(match.start() - 1, 0) : match.start()]
            if not _IN_PATH.match(before):
                end = rest.match(data, match.end())
                assert end is not None, 'it also matches nothing'
                yield match[0] + end[0]

    for file in sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size):
        with file.open('rb') as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if any(not path.startswith(known) for path in paths(data)):
                yield f'{file.relative_to(folder)}: a path of your home folder'


def prove_secrecy(run_dir: Path, args: SftArguments) -> None:
    """Search all files of the run folder for secrets, pickles and paths of the home folder.

    The outcome is written to proofs.json. If something is found, a warning is logged. What is found in the files of
    DeepSpeed is only listed in proofs.json.
    """
    started = time.perf_counter()
    secrets = find_secrets(os.environ, {'--hub_token': args.hub_token})
    files = sorted(p.relative_to(run_dir).as_posix() for p in run_dir.rglob('*') if p.is_file())
    found = [
        *scan_tree(run_dir, secrets),
        *(f'{name}: a pickle by its name' for name in files if name.endswith(PICKLE_SUFFIXES)),
        *home_paths(run_dir, Path.home(), _typed_paths(args)),
    ]

    excepted = sorted({line.split(':')[0] for line in found if _DEEPSPEED.match(line)})
    found = [line for line in found if not _DEEPSPEED.match(line)]
    if found:
        more = f'; and {len(found) - 10} more' if len(found) > 10 else ''
        says = '; '.join(found[:10]) + more
        logger.warning(
            f'{run_dir}: the run folder contains private data or pickles: {says}. Remove these before you share the '
            'folder.'
        )
    else:
        says = (
            f'{len(files)} files, archives and metadata opened, contain none of {len(secrets)} secrets of the '
            'environment, nothing that looks like a token, no pickle and no path of the home folder that was not typed'
        )
    if excepted:
        says += f'; {len(excepted)} files with the state of DeepSpeed are excepted'

    seconds = round(time.perf_counter() - started, 2)
    record_proof(run_dir, 'secrecy', {'passed': not found, 'says': says, 'excepted': excepted, 'seconds': seconds})


def _typed_paths(args: SftArguments) -> list[str]:
    data_sets = [without_amount(word) for words in args.datasets_read() for word in words]
    words = [
        args.model_id_or_path,
        args.output_dir,
        args.resume_from_checkpoint,
        args.adapter,
        args.new_tokens,
        args.chat_template,
        args.deepspeed_config_path,
        *args.score,
    ]
    return [word for word in [*words, *data_sets] if word]
