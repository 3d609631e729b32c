"""Check that a run folder has no access token, no pickle, and no path of the home folder.

Paths that were typed on the command line, or that the user wrote into the registry of models, are allowed.
"""

from __future__ import annotations

import itertools
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
from utils.run.record import PROOFS_JSON, record_proof

# Files that DeepSpeed writes. What is found in them is only listed in proofs.json and does not fail the check.
_DEEPSPEED = re.compile(r'checkpoint-\d+/global_step\d+/')
# The path of the home folder is only the end of a longer path if these bytes stand before it, as in /mnt/home/ann. The
# n of an escaped line end (\\n) is no part of a path.
_IN_PATH = re.compile(rb'(?<!\\)[\w~]/*$')
_BYTES_BEFORE = 16
# The number of findings in a message.
_SHOWN = 3
# What may not follow an allowed path, because it would be part of the name of another file.
_NAME_GOES_ON = rb'(?![\w-]|\.\w)'


def home_paths(folder: Path, home: Path, typed: Iterable[str]) -> Iterator[str]:
    """Yield a message for each file in the folder whose content has a path inside `home`.

    If `home` is a link, the folder to which it leads counts too. The paths in `typed`, and files in these folders, are
    allowed. A typed path can have wildcards (rows/*.jsonl).
    """
    homes = {os.fsencode(path) for path in (home, home.resolve()) if path != path.parent}
    # A pattern that begins with fixed text is searched several times as fast as one with a lookbehind.
    inside = [re.compile(re.escape(path) + b'/') for path in sorted(homes)]
    rest = re.compile(rb'[^\s"\'<>\\,;)\]]*')
    allowed = _allowed_paths(typed)

    def paths(data: mmap.mmap) -> Iterator[bytes]:
        for match in itertools.chain.from_iterable(pattern.finditer(data) for pattern in inside):
            before = data[max(match.start() - _BYTES_BEFORE, 0) : match.start()]
            if not _IN_PATH.search(before):
                end = rest.match(data, match.end())
                assert end is not None, 'it also matches nothing'
                yield match[0] + end[0]

    for file in sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size):
        with file.open('rb') as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if any(not allowed.match(path) for path in paths(data)):
                yield f'{file.relative_to(folder)}: a path of your home folder'


def _allowed_paths(typed: Iterable[str]) -> re.Pattern[bytes]:
    """Return a pattern whose `match` accepts the typed paths, and all paths in typed folders.

    A typed path can begin with ~ for the home folder, and can have the wildcards *, ** and ?.
    """
    patterns = [b'(?!)']  # without typed paths, nothing matches
    for word in typed:
        path = re.escape(os.fsencode(Path(word).expanduser()))
        for wildcard, meaning in ((rb'\*\*', b'.*'), (rb'\*', b'[^/]*'), (rb'\?', b'[^/]')):
            path = path.replace(wildcard, meaning)
        patterns.append(path + _NAME_GOES_ON)
    return re.compile(b'|'.join(patterns))


def prove_secrecy(run_dir: Path, args: SftArguments, registered: Iterable[str] = ()) -> None:
    """Search all files of the run folder for secrets, pickles and paths of the home folder.

    `registered` are paths that the user wrote into a registry. Like typed paths, they are allowed.

    The outcome is written to proofs.json. If something is found, a warning is logged. What is found in the files of
    DeepSpeed is only listed in proofs.json.
    """
    started = time.perf_counter()
    secrets = find_secrets(os.environ, {'--hub_token': args.hub_token})
    files = sorted(p.relative_to(run_dir).as_posix() for p in run_dir.rglob('*') if p.is_file())
    found = [
        *scan_tree(run_dir, secrets),
        *(f'{name}: a pickle by its name' for name in files if name.endswith(PICKLE_SUFFIXES)),
        *home_paths(run_dir, Path.home(), [*_typed_paths(args), *registered]),
    ]

    excepted = sorted({line.split(':')[0] for line in found if _DEEPSPEED.match(line)})
    found = [line for line in found if not _DEEPSPEED.match(line)]
    if found:
        kinds = dict.fromkeys(line.rpartition(': ')[2] for line in found)
        more = f'; and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
        says = f'found: {", ".join(kinds)}. {"; ".join(found[:_SHOWN])}{more}'
        logger.warning(
            f'{run_dir}: the run folder contains {", ".join(kinds)}: {"; ".join(found[:_SHOWN])}{more}. Remove these '
            f'before you share the folder. {PROOFS_JSON} lists all.'
        )
    else:
        says = (
            f'{len(files)} files, archives and metadata opened, contain none of {len(secrets)} secrets of the '
            'environment, nothing that looks like a token, no pickle and no path of the home folder that was not typed'
        )
    if excepted:
        says += f'; {len(excepted)} files with the state of DeepSpeed are excepted'

    seconds = round(time.perf_counter() - started, 2)
    outcome = {'passed': not found, 'says': says, 'found': found, 'excepted': excepted, 'seconds': seconds}
    record_proof(run_dir, 'secrecy', outcome)


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
