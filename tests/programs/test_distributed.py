"""Two gloo processes stand for two devices: every mode gives the numbers of one process and ordinary checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llm_infer
import llm_sft
from tests.support.runs import ROOT, small_flags, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.optional]

ZERO_2 = ['--deepspeed_config_path', 'ds_config/zero2.json', '--only_save_model', 'false']
ZERO_3 = ['--deepspeed_config_path', 'ds_config/zero3.json', '--only_save_model', 'false']
MODES = {'ddp': ['--only_save_model', 'false'], 'fsdp': ['--fsdp', 'true'], 'zero2': ZERO_2, 'zero3': ZERO_3}
RESUMABLE = ('ddp', 'zero2', 'zero3')
GREEDY = ['--do_sample', 'false', '--max_new_tokens', '8', '--infer_batch_size', '2']


class Session:
    """The folder of one launch: its plan, the notes of its ranks, its output."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        # 40 training rows give equal shares. 7 validation rows do not, for 2 processes of batch size 2.
        rows = [{'query': f'what is {i} and {i % 7}?', 'response': f'it is {i}.' + ' yes' * (i % 5)} for i in range(47)]
        self.folder = folder
        self.flags = small_flags(model_dir, write_jsonl(folder / 'qa.jsonl', rows), folder / 'out')
        # One process would join micro-batches differently than two, and rounding would differ.
        self.flags += ['--dataset_test_ratio', '0.15', '--group_by_length', 'false']
        long = [{'query': 'x' * n, 'response': 'yes ' * (n % 7 + 1)} for n in ((90, 3, 12, 9, 4, 20, 7, 31) * 6)[:47]]
        self.mixed = ['--dataset', write_jsonl(folder / 'mixed.jsonl', long).as_posix(), '--batch_size', '1']

    def words(self, name: str, *flags: str) -> list[str]:
        """Return the command line of a run that writes to `name`."""
        return [*self.flags, '--output_dir', str(self.folder / name), '--gradient_accumulation_steps', '1', *flags]

    def run_folder(self, name: str) -> Path:
        """Return the only run folder in `name`; all ranks wrote it together."""
        (folder,) = (self.folder / name).glob('*/*')
        return folder

    def resume(self, name: str) -> list[str]:
        """Return the flags that resume a run from its third step."""
        return ['--resume_from_checkpoint', f'glob:{self.folder}/{name}/*/*/checkpoint-3']

    def start(self, runs: list[list[Any]], *launcher: str, fail: list[Any] | None = None) -> subprocess.Popen[str]:
        """Start torchrun with a plan."""
        plan = self.folder / f'plan-{len(runs)}.json'
        plan.write_text(json.dumps({'runs': runs, 'notes': str(self.folder), 'fail': fail}))
        command = [sys.executable, '-m', 'torch.distributed.run', *launcher]
        return subprocess.Popen(
            [*command, str(ROOT / 'tests' / 'support' / 'distributed_driver.py'), str(plan)],
            cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )  # fmt: skip

    def notes(self, run: int) -> list[dict[str, Any]]:
        """Return what each rank noted in a run."""
        return [json.loads((self.folder / f'{run}-{rank}.json').read_text()) for rank in range(2)]


def finish(process: subprocess.Popen[str]) -> str:
    """Return the standard error of a launch; it ends within 500 seconds, also on a busy machine."""
    try:
        return process.communicate(timeout=500)[1]
    finally:
        process.kill()


def history(run: Path) -> list[dict[str, Any]]:
    state = json.loads((run / 'checkpoint-6' / 'trainer_state.json').read_text())
    return [{k: v for k, v in e.items() if 'runtime' not in k and 'second' not in k} for e in state['log_history']]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.glob('*model.safetensors')
    return load_file(file)


def assert_same(one: Path, other: Path, *, tolerance: float) -> None:
    """Compare all logged losses, gradient norms and evaluations. The drift is not measured if the model is sharded.

    A value of more than 1 may differ by this share of it: a gradient norm of 7 in float32 has steps of 5e-7.
    """
    assert len(history(one)) == len(history(other)) >= 8
    for a, b in zip(history(one), history(other), strict=True):
        assert set(a) - {'eval_drift_kl'} == set(b) - {'eval_drift_kl'}
        for key in a.keys() & b.keys():
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=tolerance), key


@pytest.fixture(scope='module')
def session(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Session:
    """Return a session in which one process and two have trained in every mode."""
    session = Session(tmp_path_factory.mktemp('distributed'), model_dir)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it: sums over more threads round differently
    with pytest.MonkeyPatch.context() as patch:
        for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
            patch.delenv(name, raising=False)
        for sft_type in ('lora', 'full'):
            flags = ['--sft_type', sft_type, '--gradient_accumulation_steps', '2', '--only_save_model', 'false']
            assert llm_sft.main(session.words(f'{sft_type}-one', *flags)) == 0
        assert llm_sft.main(session.words('apart-one', *session.mixed, '--gradient_accumulation_steps', '8')) == 0
    torch.set_num_threads(threads)
    runs: list[list[Any]] = []
    for sft_type in ('lora', 'full'):
        for mode, flags in MODES.items():
            runs.append(['llm_sft', session.words(f'{sft_type}-{mode}', '--sft_type', sft_type, *flags)])
    for sft_type in ('lora', 'full'):
        for mode in RESUMABLE:
            name = f'{sft_type}-{mode}'
            words = session.words(f'{name}-resumed', '--sft_type', sft_type, *MODES[mode], *session.resume(name))
            runs.append(['llm_sft', words])
    runs.append(['llm_sft', session.words('epoch', '--dataset_test_ratio', '0.1', '--max_steps', '-1')])
    for mode in ('fsdp', 'zero3'):
        generate = ['--predict_with_generate', 'true', *GREEDY[:4], '--max_steps', '3', '--sft_type', 'full']
        runs.append(['llm_sft', session.words(f'generate-{mode}', *generate, *MODES[mode])])
    checkpoint = f'glob:{session.folder}/full-ddp/*/*/checkpoint-6'
    runs.append(['llm_infer', ['--ckpt_dir', checkpoint, *GREEDY, '--result_path', str(session.folder / 'two.jsonl')]])
    joined = ['--gradient_accumulation_steps', '4', '--group_by_length', 'true']
    runs.append(['llm_sft', session.words('joined-two', *session.mixed, *joined)])
    process = session.start(runs, '--standalone', '--nproc_per_node=2')
    printed = finish(process)
    assert process.returncode == 0, printed[-4000:]
    return session


def test_joined_micro_batches_of_two_processes_train_as_each_by_itself(session: Session) -> None:
    one, two = (session.run_folder(name) for name in ('apart-one', 'joined-two'))
    assert_same(one, two, tolerance=2e-5)
    ranks = session.notes(18)
    assert [len(rank['rows']) for rank in ranks] == [24, 24], 'rows of 6 steps'
    assert all(6 <= rank['batches'] < 24 for rank in ranks), 'joined into fewer than a batch a row'


@pytest.mark.parametrize('sft_type', ['lora', 'full'])
def test_two_processes_equal_one_with_twice_the_accumulation(session: Session, sft_type: str) -> None:
    one, two = (session.run_folder(f'{sft_type}-{name}') for name in ('one', 'ddp'))
    losses = [[(e['loss'], e['grad_norm']) for e in history(run) if 'loss' in e] for run in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert_same(one, two, tolerance=1e-6)
    expected = weights(one / 'checkpoint-6')
    found = weights(two / 'checkpoint-6')
    assert set(expected) == set(found) and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize('sft_type', ['lora', 'full'])
@pytest.mark.parametrize('mode', ['fsdp', 'zero2', 'zero3'])
def test_sharded_modes_give_the_numbers_of_one_process(session: Session, sft_type: str, mode: str) -> None:
    assert_same(session.run_folder(f'{sft_type}-one'), session.run_folder(f'{sft_type}-{mode}'), tolerance=1e-5)


@pytest.mark.parametrize('sft_type', ['lora', 'full'])
@pytest.mark.parametrize('mode', list(MODES))
def test_checkpoints_are_whole_and_open_in_plain_classes(
    session: Session, model_dir: Path, sft_type: str, mode: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])

    def logits(name: str) -> torch.Tensor:
        checkpoint = session.run_folder(f'{sft_type}-{name}') / 'checkpoint-6'
        source = checkpoint if sft_type == 'full' else model_dir
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), 'every tensor is there and none too many'
        if sft_type == 'lora':
            model = PeftModel.from_pretrained(model, str(checkpoint))
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=ids).logits
        return found

    assert float((logits(mode) - logits('one')).abs().max()) < 1e-4


@pytest.mark.parametrize('sft_type', ['lora', 'full'])
@pytest.mark.parametrize('mode', RESUMABLE)
def test_resumed_runs_equal_the_uninterrupted_ones(session: Session, sft_type: str, mode: str) -> None:
    whole, resumed = (session.run_folder(f'{sft_type}-{mode}{end}') for end in ('', '-resumed'))
    assert history(resumed) == history(whole)
    expected = weights(whole / 'checkpoint-6')
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(resumed / 'checkpoint-6').items())


def test_only_fsdp_shards_parameters_as_dtensors(session: Session) -> None:
    """Equal losses would not prove it: a trainer that falls back to DDP on a CPU gives the same losses."""
    for number, mode in enumerate([*MODES, *MODES]):
        assert any('DTensor' in name for name in session.notes(number)[0]['parameters']) == (mode == 'fsdp'), mode


def test_each_row_is_seen_once_per_epoch(session: Session) -> None:
    ranks = session.notes(14)
    assert [rank['seeds'] for rank in ranks] == [[42, 42], [43, 42]]
    counts = Counter(tuple(row) for rank in ranks for row in rank['rows'])
    fillers = counts.pop((5,))
    assert (len(counts), fillers, set(counts.values())) == (42, 2, {1})
    assert len(ranks[0]['rows']) == len(ranks[1]['rows']) == 22


def test_answers_are_spread_over_the_ranks_and_counted_once(session: Session, tmp_path: Path) -> None:
    checkpoint = session.run_folder('full-ddp') / 'checkpoint-6'
    target = tmp_path / 'one.jsonl'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *GREEDY, '--result_path', str(target)]) == 0
    assert target.read_text() == (session.folder / 'two.jsonl').read_text()
    assert len(target.read_text().splitlines()) == 7


def test_evaluation_by_generation_works_on_sharded_weights(session: Session) -> None:
    scores = []
    for mode in ('fsdp', 'zero3'):
        state = session.run_folder(f'generate-{mode}') / 'checkpoint-3' / 'trainer_state.json'
        entry = next(e for e in json.loads(state.read_text())['log_history'] if 'eval_rouge-l' in e)
        scores.append([entry[f'eval_{name}'] for name in ('rouge-1', 'rouge-2', 'rouge-l', 'bleu-4')])
    assert scores[0] == scores[1] and scores[0][0] > 0


def test_a_killed_rank_ends_the_run_which_goes_on_from_its_checkpoint_on_two_machines(session: Session) -> None:
    killed = session.start(
        [['llm_sft', session.words('killed')]], '--standalone', '--nproc_per_node=2', fail=[0, 1, 4, 'kill -9']
    )
    printed = finish(killed)
    assert killed.returncode == 1
    root_cause = printed[printed.index('Root Cause') :]
    assert 'rank      : 1 ' in root_cause and 'Signal 9 (SIGKILL) received' in root_cause
    assert 'lost the connection' not in printed, 'the surviving rank is no cause'
    assert sorted(p.name for p in session.run_folder('killed').glob('checkpoint-*')) == ['checkpoint-3']

    runs = [
        ['llm_sft', session.words('machines')],
        ['llm_sft', session.words('killed-resumed', *session.resume('killed'))],
        ['llm_sft', session.words('failing')],
    ]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    started = [
        session.start(
            runs, '--nnodes=2', f'--node_rank={node}', '--nproc_per_node=1', '--master_addr=127.0.0.1',
            f'--master_port={port}', fail=[2, 1, 4, 'a bad batch'],
        )
        for node in range(2)
    ]  # fmt: skip
    first, second = (finish(process) for process in started)
    assert [process.returncode for process in started] == [1, 1]
    for name in ('machines', 'killed-resumed'):
        assert history(session.run_folder(name)) == history(session.run_folder('lora-ddp'))
    assert 'ArithmeticError: a bad batch' in second and 'rank 1 of 2' in second
    assert 'ArithmeticError' not in first and 'rank 0 of 2' in first and 'lost the connection to another' in first


def test_fillers_even_out_the_shares() -> None:
    from utils.data.encoded_rows import Filled

    rows = Filled(['a', 'b', 'c', 'd', 'e'], 4, 9)
    assert len(rows) == 8 and rows[4] == 'e'
    assert [rows[i] for i in (5, 6, 7)] == [{'input_ids': [9], 'trained': (0, 0), 'prompt_length': 0}] * 3
    assert len(Filled(['a', 'b', 'c', 'd'], 4, 9)) == 4
