"""The estimated memory of a training step compared with the memory measured on a CPU, in 18 settings.

The settings are 3 models x (LoRA, full, full with --full_weights bf16) x gradient checkpointing (off, on). Each takes
two optimizer steps of two batches, in a separate process. The measured figure is the peak of resident memory as the
kernel counts it (VmHWM), from the start of training; load_memory.py measures how a model is opened. The memory that the
same process holds after it trained a model of 2 layers is subtracted: libraries and tokenizer do not count.

MALLOC_ variables make glibc return freed memory, so that only live tensors are measured. llm_sft.py on a CPU keeps
freed memory for speed; --kept measures that.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import machine, make_rows, model_folder  # noqa: E402

RESULTS = ROOT / 'benchmarks' / 'results'
BATCH, ACCUMULATION, ALLOWED = 4, 2, 0.15
QKV = ['q_proj', 'k_proj', 'v_proj']
# Name, tokens per row, LoRA targets.
MODELS: dict[str, tuple[int, Any]] = {'smollm2': (96, QKV), '150k': (128, 'all-linear'), 'qwen3': (96, 'all-linear')}
# Freed memory is returned at once, so that only live tensors are resident.
RETURNED = {'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}


def cases() -> list[dict[str, Any]]:
    """Return the settings."""
    return [
        {'model': model, 'setting': setting, 'checkpointing': checkpointing}
        for model in MODELS
        for setting in ('lora', 'full', 'full bf16')
        for checkpointing in (False, True)
    ]


def folder_of(name: str) -> Path:
    """Return the folder of a model; 'qwen3' has 6 layers of Qwen3's class and is made once."""
    if name != 'qwen3':
        return model_folder(name)
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = Path(tempfile.gettempdir()) / 'assay-bench-qwen3'
    if not (folder / 'config.json').is_file():
        config = Qwen3Config(vocab_size=50_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=6,
                             num_attention_heads=16, num_key_value_heads=8, head_dim=128)  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_folder('smollm2')).save_pretrained(folder)
    return folder


def train(case: dict[str, Any], folder: Path, tokenizer: Any, length: int) -> None:
    """Train two steps of one setting with this project's trainer."""
    import contestants
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    class CountAnew(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM: man 5 proc

    full = case['setting'] != 'lora'
    held = torch.float32 if case['setting'] == 'full' else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=held)
    rows = make_rows({'length': length, 'rows': BATCH * ACCUMULATION}, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as output:
        trainer = contestants.ours(
            model, tokenizer, rows, output, variant='fast', steps=2, batch=BATCH,
            targets=None if full else MODELS[case['model']][1], accumulation=ACCUMULATION, max_length=length,
            checkpointing=case['checkpointing'], bf16_weights=case['setting'] == 'full bf16',
        )  # fmt: skip
        trainer.add_callback(CountAnew())
        trainer.train()


def measure(case: dict[str, Any]) -> float:
    """Return the peak above the baseline, in MB."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    folder = folder_of(case['model'])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as name:
        config = LlamaConfig(vocab_size=50_000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(name)
        train(case, Path(name), tokenizer, 16)
    gc.collect()
    before = resident_mb('VmRSS')
    train(case, folder, tokenizer, MODELS[case['model']][0])
    return resident_mb('VmHWM') - before


def resident_mb(name: str) -> float:
    """Return a line of /proc/self/status in MB."""
    lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def estimated(case: dict[str, Any]) -> float:
    """Return the estimated peak, in MB."""
    from utils.estimate.memory import Batch, Mode, footprint
    from utils.estimate.model_shape import shape_of
    from utils.model import get_model_info

    folder = folder_of(case['model'])
    shape = shape_of(folder, get_model_info(None, str(folder)))
    length, wanted = MODELS[case['model']]
    full = case['setting'] != 'lora'
    bf16 = case['setting'] == 'full bf16'
    mode = Mode(
        full=full, compute=2, targets=tuple(shape.linear if wanted == 'all-linear' else wanted),
        checkpointing=case['checkpointing'], gpu=False, trained=2 if bf16 else 4, optimizer_bytes=6 if bf16 else 8,
    )  # fmt: skip
    trained = length - length // 4
    found = footprint(shape, mode, Batch(tokens=BATCH * length, longest=length, trained=BATCH * trained))
    return found.peak / 2**20


def run(case: dict[str, Any], environment: dict[str, str]) -> float:
    """Return what a separate process measures."""
    words = [sys.executable, __file__, '--worker', json.dumps(case)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    settings = {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    done = subprocess.run(words, capture_output=True, text=True, env={**clean, **settings, **environment}, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    if not lines:
        raise SystemExit(f'{case} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return float(lines[0].removeprefix('RESULT '))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results in Markdown."""
    lines = ['| model | method | checkpointing | measured MB | estimated MB | off by |', '|' + '---|' * 6]
    for row in rows:
        case, off = row['case'], row['estimated'] / row['measured'] - 1
        lines.append(
            f'| {case["model"]} | {case["setting"]} | {"on" if case["checkpointing"] else "off"} | '
            f'{row["measured"]:.0f} | {row["estimated"]:.0f} | {off:+.1%} |'
        )
    return '\n'.join(lines) + '\n'


def main() -> int:
    """Measure every setting, write and print the table; return 1 if an estimate is off by more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument(
        '--kept', action='store_true', help='count memory that the allocator keeps; print, write no file'
    )
    options = parser.parse_args()
    if options.worker:
        print(f'RESULT {measure(json.loads(options.worker))}')
        return 0
    rows = []
    for case in cases():
        measured = run(case, {} if options.kept else RETURNED)
        rows.append({'case': case, 'estimated': round(estimated(case), 1), 'measured': round(measured, 1)})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    worst = max(abs(row['estimated'] / row['measured'] - 1) for row in rows)
    head = f'Off by at most {worst:.1%} of the measured peak of what lives; allowed are {ALLOWED:.0%}.\n\n'
    if options.kept:
        return 0
    content = {'machine': machine(), 'allowed': ALLOWED, 'rows': rows}
    (RESULTS / 'estimate.json').write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    (RESULTS / 'estimate.md').write_text(head + table(rows), encoding='utf-8')
    print(head)
    return int(worst > ALLOWED)


if __name__ == '__main__':
    sys.exit(main())
