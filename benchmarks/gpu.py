"""Acceptance on a GPU: correctness, memory and speed, in parts by importance. Run by benchmarks/gpu.sh; see --help.

Each case runs in its own forked process, so that its peak of memory and its failure are its own, and the libraries are
imported once. Results are written after every case, so that an interrupted run keeps what it found. A case whose time
is not left is skipped and named. The exit code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_case import Case, Found

# Without the first variable, asking whether there is a GPU would start CUDA, and no forked process could use it.
SETTINGS = {
    'PYTORCH_NVML_BASED_CUDA_CHECK': '1', 'PYTORCH_ALLOC_CONF': 'expandable_segments:True',
    'CUBLAS_WORKSPACE_CONFIG': ':4096:8', 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false',
}  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ('torch', 'transformers', 'peft', 'accelerate', 'trl', 'liger-kernel', 'bitsandbytes', 'triton')
NO_GPU = 'no GPU'


@dataclass
class Book:
    """The results so far. They are written after each case, by renaming, so that a killed run loses one case only."""

    folder: Path
    head: Found
    results: list[Found] = field(default_factory=list)

    def add(self, found: Found) -> None:
        """Keep a result, write all results, and print one line."""
        self.results.append(found)
        content = json.dumps({'machine': self.head, 'results': self.results}, indent=1) + '\n'
        for name, text in (('gpu.json', content), ('gpu.md', table(self.head, self.results))):
            new = self.folder / f'.{name}'
            new.write_text(text, encoding='utf-8')
            new.rename(self.folder / name)
        print(f'{mark(found)} {found["part"]}/{found["name"]}: {json.dumps(details(found))[:400]}', flush=True)


def mark(found: Found) -> str:
    """Return the word for a result: ok, FAIL, or skip if it says nothing."""
    return {True: 'ok  ', False: 'FAIL', None: 'skip'}[found['ok']]


def details(found: Found) -> Found:
    """Return what a case found, without its name and its traceback."""
    return {name: value for name, value in found.items() if name not in ('part', 'name', 'ok', 'trace')}


def table(head: Found, results: list[Found]) -> str:
    """Return the results in Markdown: one table for each part."""
    lines = ['# Results of benchmarks/gpu.sh', '', ', '.join(f'{name} {value}' for name, value in head.items())]
    for part in dict.fromkeys(found['part'] for found in results):
        lines += ['', f'## {part}', '', '| case | result | found |', '|---|---|---|']
        for found in results:
            if found['part'] == part:
                shown = ', '.join(f'{name} {_short(value)}' for name, value in details(found).items())
                lines.append(f'| {found["name"]} | {mark(found).strip()} | {shown.replace("|", "/")} |')
    return '\n'.join(lines) + '\n'


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'
    if isinstance(value, dict):
        return '; '.join(f'{name} {_short(inner)}' for name, inner in value.items())
    return str(value)


def run(case: Case, left: float, log: Path) -> Found:
    """Return what a case finds in a forked process, within its time and the time that is left.

    What the process prints is added to the file `log`.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context('fork').Process(target=_child, args=(case.work, there, log))
    started = time.perf_counter()
    child.start()
    there.close()
    limit = min(case.seconds, left)
    try:
        found = here.recv() if here.poll(limit) else {'ok': False, 'says': f'no result within {limit:.0f} s'}
    except EOFError:
        found = {'ok': False, 'says': 'the process ended without a result'}
    child.kill()
    child.join(5)
    return {'part': case.part, 'name': case.name, 'seconds': round(time.perf_counter() - started, 1), **found}


def _child(work: Callable[[], Found], pipe: Any, log: Path) -> None:
    import torch

    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    try:
        found = work()
        if torch.cuda.is_initialized():
            found.setdefault('peak_gib', round(torch.cuda.max_memory_allocated() / 2**30, 2))
        pipe.send(found)
    except BaseException as error:  # whatever it is, it is the result of this case
        says = f'{type(error).__name__}: {error}'[:300]
        pipe.send({'ok': False, 'says': says, 'trace': traceback.format_exc()[-3000:]})
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # destructors may wait for a GPU that no longer answers


def machine(gpu: bool) -> Found:
    """Return the date, the device and the versions. CUDA is not started."""
    found = {
        'date': time.strftime('%Y-%m-%d'),
        'device': NO_GPU,
        'cores': os.cpu_count(),
        'python': platform.python_version(),
    }
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = 'missing'
    import torch

    found['torch'] = torch.__version__  # the metadata of a wheel does not always name its version of CUDA
    if gpu:
        import subprocess

        words = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total', '--format=csv,noheader']
        found['device'] = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return found


def select(cases: list[Case], words: str) -> list[Case]:
    """Return the cases of these parts, separated by commas, in their order. Raises SystemExit for an unknown part."""
    only = [word for word in words.split(',') if word]
    known = list(dict.fromkeys(case.part for case in cases))
    if unknown := [word for word in only if word not in known]:
        raise SystemExit(f'--only {",".join(unknown)}: no such part. The parts are {", ".join(known)}.')
    return [case for case in sorted(cases, key=lambda case: case.order) if not only or case.part in only]


def main() -> int:
    """Run the cases and return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seconds', type=float, default=450, help='time for all cases together')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'gpu', help='folder of results')
    parser.add_argument('--only', default='', help='parts to run, separated by commas; all if left out')
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    os.environ.update(SETTINGS)
    sys.path[:0] = [str(ROOT)]

    import gpu_pieces
    import gpu_runs
    import torch

    gpu = torch.cuda.is_available()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ['TRITON_CACHE_DIR'] = str(options.out.resolve() / '.triton')
    chosen = select([*gpu_pieces.cases(gpu), *gpu_runs.cases()], options.only)
    book = Book(options.out, machine(gpu))
    _import_libraries(gpu)

    for case in chosen:
        left = end - time.perf_counter()
        nothing = {'part': case.part, 'name': case.name, 'ok': None}
        if case.needs_gpu and not gpu:
            book.add({**nothing, 'says': NO_GPU})
        elif left < case.seconds / 2:
            book.add({**nothing, 'says': f'skipped: {left:.0f} s are left'})
        else:
            book.add(run(case, left, options.out / 'gpu.log'))
    failed = sum(found['ok'] is False for found in book.results)
    print(f'{len(book.results)} cases, {failed} failed, {sum(found["ok"] is None for found in book.results)} skipped')
    return int(failed > 0)


def _import_libraries(gpu: bool) -> None:
    """Import once what most cases use. A forked process inherits it."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    if gpu:
        import trl  # noqa: F401
    assert not torch.cuda.is_initialized(), 'an import started CUDA, so that forked processes could not use it'


if __name__ == '__main__':
    sys.exit(main())
