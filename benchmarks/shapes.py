"""Memory of training on rows whose lengths never repeat, with this project's limit on oneDNN kernels and without.

Usage: python benchmarks/shapes.py [--batches 80]. Each measurement is a separate process; they take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import train

# oneDNN's own default.
ITS_OWN = '1024'
ROWS = 5


def measure(batches: int) -> None:
    """Print tokens per second and peak memory of batches with alpaca lengths, no two of the same shape."""
    case = {'model': 'smollm2', 'length': 16, 'rows': 4, 'batch': 1, 'accumulation': 1, 'steps': 2, 'threads': 2,
            'setting': 'lora_qkv', 'contestant': 'fast'}  # fmt: skip
    lengths = train.alpaca_lengths(ROWS * batches, seed=3)
    with tempfile.TemporaryDirectory() as output:
        trainer = train.build(case, train.model_folder('smollm2'), train.make_rows(case, 49152), output)
        trainer.train()
        model, tokens, start = trainer.model_wrapped, 0, time.perf_counter()
        for number in range(batches):
            rows = [
                {'input_ids': list(range(100, 100 + prompt + reply)), 'trained': (prompt, prompt + reply),
                 'prompt_length': prompt}
                for prompt, reply in lengths[ROWS * number : ROWS * (number + 1)]
            ]  # fmt: skip
            batch = trainer.data_collator(rows)
            trainer.accelerator.backward(trainer.compute_loss(model, batch, num_items_in_batch=100))
            tokens += batch['input_ids'].numel()
    print(f'RESULT {tokens / (time.perf_counter() - start):.0f} tokens/s, peak {train.peak_mib()} MiB')


def main() -> None:
    """Measure both in turn, twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--batches', type=int, default=80)
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure(options.batches)
        return
    name = 'ONEDNN_PRIMITIVE_CACHE_CAPACITY'
    plain = {key: x for key, x in os.environ.items() if key != name}
    for _ in range(2):
        for label, setting in (("oneDNN's own", {name: ITS_OWN}), ("this project's", {})):
            words = [sys.executable, __file__, '--worker', '--batches', str(options.batches)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env={**plain, **setting})
            print(label, *[x.removeprefix('RESULT') for x in done.stdout.splitlines() if x.startswith('RESULT')])


if __name__ == '__main__':
    main()
