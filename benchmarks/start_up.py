"""Seconds until --help and until an argument error, for both programs: python benchmarks/start_up.py"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = 7


def seconds(*words: str) -> float:
    """Return the median wall seconds of a command over RUNS runs, one unmeasured run before them."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Print a line per program and case, with the bound it must keep."""
    for program in ('llm_sft.py', 'llm_infer.py'):
        for words, bound in ((['--help'], 0.5), (['--model_type', 'llama2-7b-caht', '--max_length', '1'], 1.0)):
            took = seconds(program, *words)
            verdict = 'ok' if took < bound else 'TOO SLOW'
            print(f'{program:<14} {" ".join(words):<48} {took:.3f} s (bound {bound} s) {verdict}')


if __name__ == '__main__':
    main()
