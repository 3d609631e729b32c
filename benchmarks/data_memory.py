"""Peak anonymous memory, above the imported libraries, of the data check and of encoding, at two sizes of data.

python benchmarks/data_memory.py [SMALL LARGE]   (default: 100000 1000000 rows; allow an hour)

The data check runs on good rows, whose copy it also writes, and on rows with a finding each: a column and a key that no
other row has, mis-decoded text, and a role that is not known in every second row.

Memory-mapped files do not count, because the system can drop them at any time (RssAnon in /proc/self/status). Every
measurement is a separate process.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.encode import make_rows, tokenizer_directory  # noqa: E402
from benchmarks.load_memory import anonymous_mb  # noqa: E402

SIZES = (100_000, 1_000_000)
DISTINCT, BOUND = 10_000, 1.15


def write_file(path: Path, count: int) -> None:
    """Write alpaca rows, each with its own number, so that no two rows are equal."""
    rows = [(row.messages[0]['content'], row.messages[1]['content']) for row in make_rows(DISTINCT)]
    with path.open('w', encoding='utf-8') as stream:
        for index in range(count):
            query, reply = rows[index % DISTINCT]
            stream.write(json.dumps({'instruction': f'{query} {index}', 'input': '', 'output': reply}) + '\n')


def write_findings(path: Path, count: int) -> None:
    """Write short rows, each with its own problems, so that no two rows have the same text or names."""
    with path.open('w', encoding='utf-8') as stream:
        for index in range(count):
            reply = {'role': f'narrator {index}' if index % 2 else 'assistant', 'content': 'cafÃ©', f'key {index}': 'x'}
            turns = [{'role': 'user', 'content': f'what is {index}?'}, reply]
            stream.write(json.dumps({'messages': turns, f'column {index}': 'y'}) + '\n')


def measure(task: str, file: str, tokenizer: str) -> tuple[float, float]:
    """Run one task in this process; returns its peak in MB above the libraries, and its seconds."""
    from utils.checks.clean_copy import CleanCopy
    from utils.checks.data_check import DataCheck
    from utils.checks.repetition import Seen
    from utils.data.encode_plan import batches, prepare_data
    from utils.data.plan import plan_rows
    from utils.encode.make import make_encoder
    from utils.model import load_tokenizer

    for library in ('torch', 'transformers', 'jinja2.sandbox', 'transformers.models.auto.tokenization_auto'):
        importlib.import_module(library)
    before, peak, done = anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    encoder = make_encoder(
        load_tokenizer(tokenizer), template_type='auto', system='', system_typed=False, max_length=2048
    )
    with tempfile.TemporaryDirectory() as name:
        plan = plan_rows([file])
        if task == 'encoding':
            prepare_data(encoder, plan, Path(name))
        else:
            with (
                (Path(name) / 'findings.jsonl').open('w', encoding='utf-8') as stream,
                CleanCopy(Path(name) / 'copy.jsonl', marks_loss=True) as copy,
            ):
                check = DataCheck(encoder, 2048, stream, Seen(Path(name) / 'seen.db'), copy=copy)
                for batch in batches(plan.used()):
                    check.examine(batch)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return peak - before, seconds


def main() -> None:
    """Print peaks and their ratios."""
    if len(sys.argv) == 5 and sys.argv[1] == '--measure':
        print(json.dumps(measure(*sys.argv[2:])))
        return
    sizes = tuple(map(int, sys.argv[1:])) or SIZES
    directory = tokenizer_directory()
    with tempfile.TemporaryDirectory() as folder:
        for task, write in (
            ('data check', write_file), ('data check with findings', write_findings), ('encoding', write_file)
        ):  # fmt: skip
            files = [Path(folder) / f'{write.__name__}-{size}.jsonl' for size in sizes]
            for file, size in zip(files, sizes, strict=True):
                write(file, size)
            peaks = []
            for file, size in zip(files, sizes, strict=True):
                words = [sys.executable, __file__, '--measure', task, str(file), str(directory)]
                done = subprocess.run(
                    words, capture_output=True, text=True, check=True, cwd=ROOT,
                    env={'PATH': '/usr/bin:/bin', 'HOME': str(Path.home()), 'ASSAY_CACHE': folder},
                )  # fmt: skip
                peak, seconds = json.loads(done.stdout.splitlines()[-1])
                peaks.append(peak)
                print(f'{task}, {size} rows: peak {peak:.0f} MB above the libraries, {seconds:.0f} s', flush=True)
            ratio = peaks[-1] / peaks[0]
            print(f'{task}: ratio {ratio:.2f} (bound {BOUND}) {"ok" if ratio <= BOUND else "TOO MUCH"}')


if __name__ == '__main__':
    main()
