"""Parts 4 to 7 of benchmarks/gpu.py: whole programs, memory against the estimate, speed against peers, a profile.

Models have random weights in the shapes of Qwen2.5, made on the GPU. Speed and memory do not depend on the values.
Without a GPU, all models have the shape `tiny`, and only the programs are run.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gpu_case import Case, Found
from gpu_pieces import device

ROOT = Path(__file__).resolve().parent.parent
# Width, width of the MLP, layers, heads, key heads, vocabulary, tied embeddings.
SHAPES = {
    '0.5B': (896, 4864, 24, 14, 2, 151_936, True),
    '1.5B': (1536, 8960, 28, 12, 2, 151_936, True),
    '7B': (3584, 18944, 28, 28, 4, 152_064, False),
    'tiny': (32, 64, 2, 4, 2, 400, False),
}
QKV = ['q_proj', 'k_proj', 'v_proj']
WARM, TIMED = 2, 5
# What an H200 multiplies in bf16, as its data sheet says.
PEAK_FLOPS = 990e12
# Model, method, rows of a batch, batches of a step, tokens of each row (0: lengths like alpaca's).
SPEED: dict[str, tuple[str, str, int, int, int]] = {
    '1.5B LoRA, alpaca, 64 rows': ('1.5B', 'all', 16, 4, 0),
    '7B LoRA, alpaca, 64 rows': ('7B', 'all', 16, 4, 0),
    '7B LoRA, 4 rows of 4096': ('7B', 'all', 1, 4, 4096),
    '1.5B full, alpaca, 64 rows': ('1.5B', 'full', 16, 4, 0),
    '0.5B LoRA on q, k, v, alpaca, 16 rows': ('0.5B', 'qkv', 1, 16, 0),
    '7B full in bf16 weights, 16 rows of 1024': ('7B', 'full bf16', 4, 4, 1024),
}
CONTESTANTS = {
    '1.5B LoRA, alpaca, 64 rows': ('plain', 'fast', 'trl_packing', 'trl_liger', 'padded', 'fast'),
    '0.5B LoRA on q, k, v, alpaca, 16 rows': ('plain', 'fast'),
    '7B full in bf16 weights, 16 rows of 1024': ('fast',),
}
USUAL = ('plain', 'fast', 'trl_packing')
# Model, method, gradient checkpointing, tokens of each row.
MEMORY = [('0.5B', 'qkv', False, 512), ('0.5B', 'all', False, 512), ('0.5B', 'full', False, 512),
          ('1.5B', 'qkv', False, 512), ('1.5B', 'all', False, 512), ('1.5B', 'full', False, 512),
          ('7B', 'all', True, 2048), ('1.5B', 'all', True, 2048)]  # fmt: skip
ALLOWED = 0.15


def sizes(name: str) -> tuple[int, int, int, int, int, int, bool]:
    """Return the sizes of a shape. Without a GPU, they are those of the shape `tiny`."""
    return SHAPES[name if torch.cuda.is_available() else 'tiny']


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> dict[str, float]:
    """Return the peaks of allocated and of reserved memory. They are 0 without a GPU."""
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    return {name: bytes_ / 2**30 for name, bytes_ in zip(('peak_gib', 'reserved_gib'), peaks, strict=True)}


def config(name: str) -> Any:
    """Return the config of a shape."""
    from transformers import Qwen2Config

    width, inner, layers, heads, key_heads, vocabulary, tied = sizes(name)
    return Qwen2Config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=5,
    )  # fmt: skip


def random_model(name: str, dtype: torch.dtype, **settings: Any) -> Any:
    """Return a model with random weights, made on the GPU."""
    from transformers import AutoModelForCausalLM

    with device():
        return AutoModelForCausalLM.from_config(config(name), dtype=dtype, **settings)


def programs(extra: tuple[str, ...], exact: bool) -> Found:
    """Train 6 steps in one run; train again, stop by SIGTERM in step 3, and resume. Compare both checkpoints."""
    import llm_sft
    from tests.support.runs import assert_equal, log_lines, small_flags, write_jsonl
    from tests.support.tiny_models import make_model, make_tokenizer
    from utils.train.trainer import SftTrainer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model().save_pretrained(folder / 'model')
        make_tokenizer().save_pretrained(folder / 'model')
        rows = [{'query': f'what is {i}?', 'response': f'the answer is {i}.' + ' yes' * (i % 5)} for i in range(40)]
        data = write_jsonl(folder / 'rows.jsonl', rows)

        def train(output: str, *words: str) -> int:
            return int(llm_sft.main([*small_flags(folder / 'model', data, folder / output), *extra, *words]))

        whole_code = train('whole')
        original = SftTrainer.training_step
        calls: list[int] = []

        def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.in_preflight and self.state.global_step == 2 and not calls:
                calls.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

        SftTrainer.training_step = stopping
        stopped_code = train('stopped')
        SftTrainer.training_step = original
        checkpoint = next((folder / 'stopped').glob('*/*/checkpoint-3'))
        resumed_code = train('stopped', '--resume_from_checkpoint', str(checkpoint))

        ends = [max((folder / o).glob('*/*/checkpoint-6'), key=os.path.getmtime) for o in ('whole', 'stopped')]
        if exact:
            assert_equal(ends[1], ends[0])
        losses = [[line['loss'] for line in log_lines(end) if 'loss' in line] for end in ends]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return {'ok': (whole_code, stopped_code, resumed_code) == (0, 143, 0) and apart <= 1e-3, 'losses_apart': apart}


def out_of_memory() -> Found:
    """Train with too little memory: the first-step gate must end the run with its advice, and free the memory."""
    import llm_sft
    from tests.support.runs import small_flags, write_jsonl
    from tests.support.tiny_models import make_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model('0.5B', torch.bfloat16).save_pretrained(folder / 'model')
        make_tokenizer().save_pretrained(folder / 'model')
        data = write_jsonl(folder / 'rows.jsonl', [{'query': 'what?', 'response': 'yes ' * 1500}] * 40)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((before + 3 * 2**30) / whole)
        words = ['--dtype', 'bf16', '--batch_size', '8', '--max_length', '2048', '--lora_target_modules', 'ALL']
        code = llm_sft.main([*small_flags(folder / 'model', data, folder / 'output'), *words])
        torch.cuda.set_per_process_memory_fraction(1.0)
    kept = (torch.cuda.memory_allocated() - before) / 2**20
    return {'ok': code == 2 and kept <= 1, 'exit_code': code, 'kept_mib': kept}


def answers() -> Found:
    """Generate greedy answers in one batch and one by one, in fp32; measure the speed of a batch in bf16."""
    from transformers import GenerationConfig

    from tests.support.tiny_models import make_model
    from utils.infer.generation import generate_rows

    settings = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=[2], pad_token_id=5, bos_token_id=1)
    prompts = [[6 + (7 * i + 11 * n) % 390 for i in range(5 + 3 * n)] for n in range(16)]
    tiny = make_model().to(device()).eval()
    together = generate_rows(tiny, prompts, settings, batch_size=16)
    alone = generate_rows(tiny, prompts, settings, batch_size=1)

    model = random_model('0.5B', torch.bfloat16).eval()
    generate_rows(model, prompts[:2], settings, batch_size=2)
    synchronize()
    started = time.perf_counter()
    made = generate_rows(model, prompts, settings, batch_size=16)
    seconds = time.perf_counter() - started
    return {'ok': together == alone, 'tokens_per_second': sum(map(len, made)) / seconds}


def tests() -> Found:
    """Run the tests that take the GPU by themselves."""
    files = ['tests/train/test_resume.py', 'tests/proofs/test_first_step.py', 'tests/train/test_guards.py',
             'tests/train/test_training.py', 'tests/fast']  # fmt: skip
    words = [sys.executable, '-m', 'pytest', '-q', '-n', '8', '-m', 'not processes and not optional', *files]
    done = subprocess.run([*words, '--device', 'cuda'], capture_output=True, text=True, cwd=ROOT, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [line.removeprefix('FAILED ')[:120] for line in lines if line.startswith('FAILED')]
    return {'ok': done.returncode == 0, 'says': lines[-1] if lines else done.stderr[-300:], 'failed': failed[:20]}


def trainer_of(
    contestant: str, shape: str, method: str, *, rows: list[dict[str, Any]], batch: int, accumulation: int, length: int,
    checkpointing: bool, output: str,
) -> Any:  # fmt: skip
    """Return the trainer of a contestant, on a random model."""
    import contestants
    from flash_attn_stand_in import install

    from tests.support.tiny_models import make_tokenizer

    settings: dict[str, Any] = {}
    if contestant.startswith('trl'):
        install(Path(output) / 'site')
        settings['attn_implementation'] = 'flash_attention_2'
    model = random_model(shape, torch.float32 if method == 'full' else torch.bfloat16, **settings)
    make: Any = contestants.trl if contestant.startswith('trl') else contestants.ours
    own = {'checkpointing': checkpointing, 'bf16_weights': method == 'full bf16'} if make is contestants.ours else {}
    if contestant == 'plain':
        make, own = contestants.plain, {}
    return make(
        model, make_tokenizer(), rows, output, targets={'qkv': QKV, 'all': 'all-linear'}.get(method),
        variant=contestant, steps=WARM + TIMED, batch=batch, accumulation=accumulation, max_length=length or 1024,
        **own,
    )  # fmt: skip


def speed(setting: str, contestant: str) -> Found:
    """Measure real tokens per second, the peak of memory, and the share of the GPU's peak that is used."""
    from train import make_rows
    from transformers import TrainerCallback

    shape, method, batch, accumulation, length = SPEED[setting]
    rows = make_rows({'length': length, 'rows': batch * accumulation}, sizes(shape)[5])
    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize()
            marks.append(time.perf_counter())
            if len(marks) == WARM and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(
            contestant, shape, method, rows=rows, batch=batch, accumulation=accumulation, length=length,
            checkpointing=False, output=output,
        )  # fmt: skip
        trainer.add_callback(Marks())
        trainer.train()
    seconds = (marks[-1] - marks[WARM - 1]) / TIMED
    tokens = sum(len(row['input_ids']) for row in rows)
    trained = sum(row['trained'][1] - row['trained'][0] for row in rows)
    width, _, _, _, _, vocabulary, tied = sizes(shape)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    body = parameters - vocabulary * width * (1 if tied else 2)
    flops = (tokens * body + trained * vocabulary * width) * (6 if method.startswith('full') else 4)
    return {
        'ok': True,
        'tokens_per_second': tokens / seconds,
        **peak_gib(),
        'share_of_peak_flops': flops / seconds / PEAK_FLOPS,
        'steps': len(marks),
    }


def memory(shape: str, method: str, checkpointing: bool, length: int) -> Found:
    """Compare the peak of allocated memory with the estimate of a dry run."""
    from train import make_rows
    from transformers import TrainerCallback

    from utils.estimate.memory import Batch, Mode, footprint
    from utils.estimate.model_shape import shape_of
    from utils.model import get_model_info

    class CountAnew(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    batch, accumulation = 4, 2
    rows = make_rows({'length': length, 'rows': batch * accumulation}, sizes(shape)[5])
    with tempfile.TemporaryDirectory() as output:
        config(shape).save_pretrained(output)
        described = shape_of(Path(output), get_model_info(None, output))
        trainer = trainer_of(
            'fast', shape, method, rows=rows, batch=batch, accumulation=accumulation, length=length,
            checkpointing=checkpointing, output=output,
        )  # fmt: skip
        trainer.args.max_steps = 2
        trainer.add_callback(CountAnew())
        trainer.train()
    targets = {'qkv': tuple(QKV), 'all': tuple(described.linear), 'full': ()}[method]
    mode = Mode(full=method == 'full', compute=2, targets=targets, checkpointing=checkpointing, gpu=True)
    trained = length - length // 4
    estimate = footprint(described, mode, Batch(tokens=batch * length, longest=length, trained=batch * trained)).peak
    found = {**peak_gib(), 'estimated_gib': estimate / 2**30}
    found['off_by'] = found['estimated_gib'] / max(found['peak_gib'], 1e-9) - 1
    return {'ok': abs(found['off_by']) <= ALLOWED, **found}


def profile() -> Found:
    """Name the kernels that take most time in a step of the first setting, and the share of time without a kernel."""
    from torch.profiler import ProfilerActivity
    from train import make_rows
    from transformers import TrainerCallback

    shape, method, batch, accumulation, length = next(iter(SPEED.values()))
    rows = make_rows({'length': length, 'rows': batch * accumulation}, sizes(shape)[5])
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    recorder = torch.profiler.profile(activities=[*gpu, ProfilerActivity.CPU])
    seconds: list[float] = []

    class OneStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == WARM:
                synchronize()
                recorder.start()
                seconds.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == WARM + 1:
                synchronize()
                seconds.append(time.perf_counter())
                recorder.stop()

    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(
            'fast', shape, method, rows=rows, batch=batch, accumulation=accumulation, length=length,
            checkpointing=False, output=output,
        )  # fmt: skip
        trainer.add_callback(OneStep())
        trainer.train()
    kernels: Counter[str] = Counter()
    for event in recorder.key_averages():
        kernels[event.key[:60]] += event.self_device_time_total / 1e3
    busy = sum(kernels.values())
    launches = sum(event.count for event in recorder.key_averages() if 'LaunchKernel' in event.key)
    wall = (seconds[1] - seconds[0]) * 1e3
    return {
        'ok': True,
        'step_ms': wall,
        'idle': 1 - busy / wall,
        'launches': launches,
        'ms': dict(kernels.most_common(15)),
    }


def cases() -> list[Case]:
    """Return the cases of parts 4 to 7. They all need a GPU."""
    work = functools.partial
    runs = {
        'resume, LoRA': (('--sft_type', 'lora'), True),
        'resume, full': (('--sft_type', 'full'), True),
        'resume, packing': (('--packing', 'true', '--max_length', '64'), True),
        'resume, bf16': (('--dtype', 'bf16'), False),
        'resume, bf16, deterministic': (('--dtype', 'bf16', '--deterministic', 'true'), True),
    }
    found = [
        *(Case('programs', name, work(programs, *how), 60, 3, 'LoRA' not in name) for name, how in runs.items()),
        Case('programs', 'out of memory', out_of_memory, 60, 3, True),
        Case('programs', 'answers', answers, 40, 3, False),
        Case('programs', 'tests', tests, 120, 7, True),
        Case('profile', 'a step', profile, 60, 8, True),
    ]
    for number, setting in enumerate(SPEED):
        # The first two settings come before classes and memory.
        order = 2 + number / 10 if number < 2 else 6 + number / 10
        for turn, name in enumerate(CONTESTANTS.get(setting, USUAL)):
            label = f'{setting}: {name}' + (' again' if name in CONTESTANTS.get(setting, USUAL)[:turn] else '')
            found.append(Case('speed', label, work(speed, setting, name), 60, order, True))
    for shape, method, checkpointing, length in MEMORY:
        label = f'{shape} {method}{", checkpointing" if checkpointing else ""}, rows of {length}'
        found.append(Case('memory', label, work(memory, shape, method, checkpointing, length), 40, 5, True))
    return found
