"""Seconds until --help, an argument error and the first training step: python benchmarks/start_up.py"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train import model_folder

ROOT = Path(__file__).resolve().parent.parent
RUNS = 7


def seconds(*words: str) -> float:
    """Return the median wall seconds of a command over RUNS runs, after one run that is not measured."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def until_first_step(model: Path) -> tuple[float, float]:
    """Return the seconds from the command to the first step without the preflight, and those of the preflight."""
    with tempfile.TemporaryDirectory() as output:
        words = [
            sys.executable, 'llm_sft.py', '--model_id_or_path', str(model), '--dataset', 'sql-demo', '--max_steps', '1',
            '--gradient_accumulation_steps', '1', '--dataset_test_ratio', '0', '--logging_steps', '1',
            '--output_dir', output,
        ]  # fmt: skip
        start = time.perf_counter()
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            assert running.stdout is not None
            for line in running.stdout:
                if "'loss'" in line:
                    took = time.perf_counter() - start
                    running.communicate()
                    (run,) = Path(output).glob('*/*/run.json')
                    trial = json.loads(run.read_text(encoding='utf-8'))['preflight_seconds']
                    return took - trial, trial
            raise SystemExit('no step was taken')


def main() -> None:
    """Print a line per program and case, with the bound it must keep."""
    for program in ('llm_sft.py', 'llm_infer.py'):
        for words, bound in ((['--help'], 0.2), (['--model_type', 'llama2-7b-caht', '--max_length', '1'], 1.0)):
            took = seconds(program, *words)
            verdict = 'ok' if took < bound else 'TOO SLOW'
            print(f'{program:<14} {" ".join(words):<48} {took:.3f} s (bound {bound} s) {verdict}')
    folder = model_folder('smollm2')
    until_first_step(folder)
    took, trial = (statistics.median(each) for each in zip(*(until_first_step(folder) for _ in range(3)), strict=True))
    verdict = 'ok' if took <= 5 else 'TOO SLOW'
    print(f'{"llm_sft.py":<14} {"first step of SmolLM2-135M":<48} {took:.3f} s (bound 5 s) {verdict}')
    print(f'{"":<14} {"the preflight before it (--preflight)":<48} {trial:.3f} s more')


if __name__ == '__main__':
    main()
