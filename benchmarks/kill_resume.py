#!/usr/bin/env python
"""Kill runs with SIGKILL at random moments, resume them, and compare them bit by bit with runs that were not stopped.

Each run is a fork of this process, which has loaded the libraries, so that a run starts within a second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.base.checkpoint import MANIFEST, all_checkpoints, damage, partial_name  # noqa: E402
from utils.cli.arguments import SftArguments, flag_types  # noqa: E402

STEPS = 16
_PR_SET_PDEATHSIG = 1
# Number of processes and flags of each mode. A mode is skipped if this checkout does not have one of its flags.
MODES: dict[str, tuple[int, str]] = {
    'lora': (1, '--lora_dropout_p 0.1'),
    'lora, worker, log every 3': (1, '--lora_dropout_p 0.1 --dataloader_num_workers 1 --logging_steps 3'),
    'full': (1, '--sft_type full'),
    'full, bf16': (1, '--sft_type full --dtype bf16'),
    'full, weights in bf16': (1, '--sft_type full --dtype bf16 --full_weights bf16'),
    'packing': (1, '--packing true --lora_dropout_p 0.1'),
    'streaming': (1, '--streaming true --stream_val_rows 8 --lora_dropout_p 0.1'),
    'lora, 2 processes': (2, '--lora_dropout_p 0.1'),
    'full, 2 processes': (2, '--sft_type full'),
    'full, weights in bf16, 2 processes': (2, '--sft_type full --dtype bf16 --full_weights bf16'),
    'DeepSpeed, 2 processes': (2, '--lora_dropout_p 0.1 --deepspeed_config_path {deepspeed}'),
}
DEEPSPEED = {
    'train_micro_batch_size_per_gpu': 'auto', 'gradient_accumulation_steps': 'auto', 'gradient_clipping': 'auto',
    'zero_optimization': {'stage': 2},
}  # fmt: skip


@dataclass
class Outcome:
    """Counts of the kills of one mode."""

    kills: int = 0
    equal: int = 0
    before_first_checkpoint: int = 0
    while_saving: int = 0
    differences: list[str] = field(default_factory=list)


def make_inputs(folder: Path) -> None:
    """Write a tiny model, rows and a DeepSpeed configuration."""
    from tests.support.runs import write_jsonl
    from tests.support.tiny_models import make_model, make_tokenizer

    make_model().save_pretrained(folder / 'tiny')
    make_tokenizer().save_pretrained(folder / 'tiny')
    rows = [{'query': f'what is {i}?', 'response': f'the answer is {i}.' + ' yes' * (i % 5)} for i in range(40)]
    write_jsonl(folder / 'rows.jsonl', rows)
    (folder / 'deepspeed.json').write_text(json.dumps(DEEPSPEED), encoding='utf-8')


def base_flags(folder: Path) -> list[str]:
    """Make the inputs of runs in `folder`; return the flags of a run that saves and evaluates often."""
    # In a separate fork: the tokenizer's threads, once started in this process, would be missing in every later fork.
    child = os.fork()
    if child == 0:
        try:
            make_inputs(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert wait([child]) == [0]
    os.environ['TORCH_EXTENSIONS_DIR'] = str(folder / 'extensions')  # DeepSpeed compiles into it at its first run
    return (
        f'--model_id_or_path {folder / "tiny"} --dataset {folder / "rows.jsonl"} --dtype fp32 --learning_rate 0.01 '
        '--dataset_test_ratio 0.1 --batch_size 2 --gradient_accumulation_steps 2 --logging_steps 1 --eval_steps 4 '
        f'--save_steps 2 --save_total_limit -1 --only_save_model false --dataloader_num_workers 0 --max_steps {STEPS}'
    ).split()


def start(words: list[str], output: Path, processes: int) -> list[int]:
    """Fork a training run of one or several processes; returns their ids."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = found.getsockname()[1]
    output.mkdir(parents=True, exist_ok=True)
    ids = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no run outlives this process
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                )  # fmt: skip
            os._exit(_train(words, output, rank))
        ids.append(child)
    return ids


def _train(words: list[str], output: Path, rank: int) -> int:
    """Train in this process; write its output and the rows of each step to files."""
    import llm_sft
    from utils.train.trainer import SftTrainer

    log = os.open(output / f'log-{rank}.txt', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seen = (output / f'rows-{rank}.jsonl').open('a', buffering=1, encoding='utf-8')
    compute_loss = SftTrainer.compute_loss

    def noted(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self.in_preflight:
            seen.write(json.dumps([self.state.global_step, inputs['rows'].tolist()]) + '\n')
        return compute_loss(self, model, inputs, *args, **kwargs)

    SftTrainer.compute_loss = noted  # type: ignore[method-assign]
    try:
        return llm_sft.main([*words, '--output_dir', str(output)])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def wait(ids: list[int]) -> list[int]:
    """Return the exit codes of processes, once all have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ids]


def run_until(ids: list[int], ready: Callable[[], bool], seconds: float) -> float | None:
    """Wait until a run is ready and `seconds` more; return when it was ready, None if it ended before."""
    began = time.monotonic()
    was_ready = None
    while was_ready is None or time.monotonic() - began < was_ready + seconds:
        if os.waitid(os.P_PID, ids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return None
        if was_ready is None and ready():
            was_ready = time.monotonic() - began
        time.sleep(0.001)
    return was_ready


def kill(ids: list[int]) -> bool:
    """Kill all processes of a run; returns whether all of them were still running."""
    for child in ids:
        os.kill(child, signal.SIGKILL)
    return all(code == -signal.SIGKILL for code in wait(ids))


def run_folder(output: Path) -> Path | None:
    """Return the run folder under an output folder, None before it is made."""
    # A run tests the folder by writing a hidden entry, which may disappear during the listing.
    models = [folder for folder in output.iterdir() if folder.is_dir() and not folder.name.startswith('.')]
    return next(iter(sorted(run for model in models for run in model.glob('v*'))), None)


def has_checkpoint(output: Path) -> bool:
    """Return whether a run has written a checkpoint."""
    run = run_folder(output)
    return run is not None and bool(all_checkpoints(run))


def facts(output: Path, processes: int) -> dict[str, Any]:
    """Return what must be equal: log lines, hashes of the last checkpoint's states, the rows of each step."""
    run = run_folder(output)
    assert run is not None
    last = all_checkpoints(run)[-1]
    assert last.name == f'checkpoint-{STEPS}' and damage(last) is None
    history = json.loads((last / 'trainer_state.json').read_text())['log_history']
    timed = ('runtime', 'second')
    files = json.loads((last / MANIFEST).read_text())['files']
    rows = {}
    for rank in range(processes):
        for line in (output / f'rows-{rank}.jsonl').read_text().splitlines():
            step, indices = json.loads(line)
            rows.setdefault((rank, step), []).append(indices)
    return {
        'history': [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in history],
        'files': {n: f['sha256'] for n, f in files.items() if n.endswith('.safetensors')},
        'rows': rows,
    }


def compare(whole: dict[str, Any], resumed: dict[str, Any], step: int) -> list[str]:
    """Return the differences between an uninterrupted run and one resumed from `step`."""
    differences = [f'log line {a} is {b}' for a, b in zip(whole['history'], resumed['history'], strict=False) if a != b]
    if len(whole['history']) != len(resumed['history']):
        differences.append(f'{len(whole["history"])} log lines are {len(resumed["history"])}')
    differences += [f'{name} differs' for name, sha in whole['files'].items() if resumed['files'].get(name) != sha]
    differences += [
        f'rows of step {at}: {rows} are {resumed["rows"].get((rank, at))}'
        for (rank, at), rows in whole['rows'].items()
        if at >= step and resumed['rows'].get((rank, at)) != rows
    ]
    return differences


def is_known(name: str) -> bool:
    """Return whether this checkout has the flags of a mode; print which ones are missing."""
    unknown = {w for w in MODES[name][1].split() if w.startswith('--')} - {f'--{n}' for n in flag_types(SftArguments)}
    if unknown:
        print(f'{name}: skipped, there is no {", ".join(sorted(unknown))}')
    return not unknown


def run_mode(name: str, kills: int, folder: Path, base: list[str], chance: random.Random) -> Outcome:
    """Kill and resume one mode `kills` times."""
    processes, flags = MODES[name]
    words = [*base, *flags.format(deepspeed=folder / 'deepspeed.json').split()]
    place = folder / name.replace(' ', '_')
    if 'DeepSpeed' in name:
        wait(start([*words, '--max_steps', '1'], place / 'compile', processes))
    began = time.monotonic()
    ids = start(words, place / 'whole', processes)
    until_saved = run_until(ids, lambda: has_checkpoint(place / 'whole'), 0) or 0.0
    codes, seconds = wait(ids), time.monotonic() - began
    assert codes == [0] * processes, (place / 'whole' / 'log-0.txt').read_text()[-3000:]
    whole = facts(place / 'whole', processes)
    outcome = Outcome()
    while outcome.kills < kills:
        killed = place / f'kill-{time.monotonic_ns()}'
        ids = start(words, killed / 'killed', processes)
        # Four in five kills fall after the first checkpoint, the others anywhere: most of a short run is its start.
        if chance.random() < 0.8:
            moment = chance.uniform(0, seconds - until_saved)
            run_until(ids, lambda place=killed: has_checkpoint(place / 'killed'), moment)  # type: ignore[misc]
        else:
            run_until(ids, lambda: True, chance.uniform(0, seconds))
        if kill(ids):  # otherwise the run had ended before
            _resume_once(killed, words, processes, whole, outcome)
    print(
        f'{name}: {outcome.equal} of {outcome.kills} equal; killed before the first checkpoint '
        f'{outcome.before_first_checkpoint}, while saving {outcome.while_saving}; one run {seconds:.1f} s', flush=True,
    )  # fmt: skip
    for difference in outcome.differences[:5]:
        print(f'  {difference}')
    return outcome


def _resume_once(place: Path, words: list[str], processes: int, whole: dict[str, Any], outcome: Outcome) -> None:
    """Resume a killed run from its last checkpoint, or start it again if there is none, and compare."""
    outcome.kills += 1
    for lock in Path(os.environ['TORCH_EXTENSIONS_DIR']).rglob('lock'):
        lock.unlink()  # torch waits forever for the lock of a process that was killed while it loaded an extension
    run = run_folder(place / 'killed')
    checkpoints = all_checkpoints(run) if run else []
    outcome.while_saving += bool(run and list(run.glob(partial_name(run / 'checkpoint-*').name)))
    step = 0
    resume: list[str] = []
    if checkpoints:
        step = int(checkpoints[-1].name.split('-')[1])
        resume = ['--resume_from_checkpoint', str(checkpoints[-1])]
    else:
        outcome.before_first_checkpoint += 1
    if step == STEPS:
        # The run was killed after its last checkpoint, so only that checkpoint is compared.
        differences = compare(whole, facts(place / 'killed', processes), STEPS)
    else:
        codes = wait(start([*words, *resume], place / 'resumed', processes))
        if codes != [0] * processes:
            text = (place / 'resumed' / 'log-0.txt').read_text()[-1500:]
            outcome.differences.append(f'the run resumed from step {step} ended with {codes}: {text}')
            return
        differences = compare(whole, facts(place / 'resumed', processes), step)
    outcome.equal += not differences
    outcome.differences += [f'resumed from step {step}: {d}' for d in differences]


def main() -> int:
    """Run the chosen modes; return 0 if every resumed run was equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=30, help='number of kills, shared among the modes')
    parser.add_argument('--modes', nargs='*', default=list(MODES), choices=list(MODES))
    parser.add_argument(
        '--seed', type=int, default=0, help='seed of the random moments; what a kill interrupts depends on the machine'
    )
    asked = parser.parse_args()
    import llm_sft  # noqa: F401
    from utils.proofs import first_step  # noqa: F401  loaded once, before the forks
    from utils.train import prepare  # noqa: F401  loaded once, before the forks

    began, chance = time.monotonic(), random.Random(asked.seed)
    modes = [name for name in asked.modes if is_known(name)]
    with tempfile.TemporaryDirectory() as made:
        base = base_flags(Path(made))
        shares = [asked.kills // len(modes) + (i < asked.kills % len(modes)) for i in range(len(modes))]
        outcomes = [run_mode(name, n, Path(made), base, chance) for name, n in zip(modes, shares, strict=True)]
    kills, equal = sum(o.kills for o in outcomes), sum(o.equal for o in outcomes)
    print(f'{equal} of {kills} resumed runs equal the uninterrupted one; {time.monotonic() - began:.0f} s in all')
    return 0 if equal == kills else 1


if __name__ == '__main__':
    sys.exit(main())
