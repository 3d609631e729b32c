"""Runs that are stopped, interrupted or refused: the files that remain, and bitwise identical resuming."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, assert_equal, hashes, log_lines, small_flags
from utils.base.checkpoint import MANIFEST, PICKLE_SUFFIXES, all_checkpoints, damage
from utils.base.errors import Problems as CollectedProblems
from utils.run.record import _check_resumed_optimizer

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
SCRATCH_FLAGS = ('--eval_steps', '2', '--save_total_limit', '-1', '--lora_dropout_p', '0.1')


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sends this process a signal inside a step or inside the evaluation after it."""
    from utils.train.trainer import SftTrainer

    def plan(signum: int, *, step: int, during: str) -> None:
        original = getattr(SftTrainer, during)
        sent: list[int] = []

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            at = self.state.global_step + (during == 'training_step')
            if at == step and not self.in_preflight and not sent:
                sent.append(signum)
                os.kill(os.getpid(), signum)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SftTrainer, during, wrapped)

    return plan


@pytest.mark.slow
@pytest.mark.parametrize('during', ['training_step', 'prediction_step'])
@pytest.mark.parametrize(('signum', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    signum: int,
    code: int,
    during: str,
    run_sft: Run,
    signal_at: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 4 has an evaluation. The run stops before it, and the resumed run does it."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    whole = run_sft(*SCRATCH_FLAGS)
    with monkeypatch.context() as patch:
        signal_at(signum, step=4, during=during)
        stopped = run_sft(*SCRATCH_FLAGS, '--hub_token', 'canary-0123', expect=code)
        patch.undo()
    monkeypatch.undo()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [p.name for p in all_checkpoints(stopped)] == ['checkpoint-2', 'checkpoint-4']
    assert damage(stopped / 'checkpoint-4') is None
    message = next(r.getMessage() for r in caplog.records if r.getMessage().startswith('stopped by'))
    name = signal.Signals(signum).name
    assert message.startswith(f'stopped by {name} after step 4 of 6; {stopped / "checkpoint-4"} is complete.')
    assert 'canary' not in caplog.text
    command = shlex.split(message.splitlines()[1])
    assert command[:2] == ['python', 'llm_sft.py']
    assert command[-2:] == ['--resume_from_checkpoint', str(stopped / 'checkpoint-4')]
    import llm_sft

    before = set(stopped.parent.iterdir())
    assert llm_sft.main(command[2:]) == 0
    (resumed,) = set(stopped.parent.iterdir()) - before
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    assert sum('eval_loss' in line for line in log_lines(resumed / 'checkpoint-6')) == 3


@pytest.mark.slow
def test_a_signal_in_the_last_step_lets_the_run_end(run_sft: Run, signal_at: Callable[..., None]) -> None:
    signal_at(signal.SIGTERM, step=6, during='training_step')
    run = run_sft(*SCRATCH_FLAGS)
    assert (run / 'run.json').is_file()


@pytest.mark.slow
def test_a_signal_at_a_step_that_is_not_logged_loses_no_loss(
    run_sft: Run, signal_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ('--logging_steps', '4', '--eval_steps', '3', '--max_steps', '8', '--dataloader_num_workers', '1')
    whole = run_sft(*flags)
    signal_at(signal.SIGTERM, step=6, during='training_step')
    stopped = run_sft(*flags, expect=143)
    monkeypatch.undo()
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(stopped / 'checkpoint-6'))
    assert_equal(resumed / 'checkpoint-8', whole / 'checkpoint-8')
    assert [line['step'] for line in log_lines(whole / 'checkpoint-8') if 'loss' in line] == [1, 4, 8]


@pytest.mark.slow
def test_a_second_signal_quits_at_once_and_an_echo_does_not() -> None:
    code = (
        'import os, signal, sys, time\n'
        'from utils.train.stop import StopSignals\n'
        'me = os.getpid()\n'
        'with StopSignals() as stop:\n'
        '    os.kill(me, signal.SIGTERM); os.kill(me, signal.SIGTERM)\n'
        '    assert stop.signum == signal.SIGTERM\n'
        '    print("alive", flush=True); time.sleep(1.05)\n'
        '    os.kill(me, signal.SIGINT); print("not reached", flush=True)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, 'alive\n')
    assert done.stderr.strip() == 'finishing this step and writing a checkpoint; a second signal quits at once'


@pytest.mark.slow
def test_a_flipped_byte_is_refused_by_name(run_sft: Run, problems: Problems) -> None:
    run = run_sft('--save_total_limit', '-1')
    checkpoint = run / 'checkpoint-6'
    for name in ('adapter_model.safetensors', 'optimizer.safetensors', 'trainer_state.json'):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        run_sft('--max_steps', '8', '--resume_from_checkpoint', str(checkpoint), expect=2)
        assert problems()[-1] == (
            f'--resume_from_checkpoint {checkpoint} cannot be used, because {name} is corrupted: its bytes are not '
            f'those that were written (sha256 differs). Use {run / "checkpoint-3"}, which is intact.'
        )
        (checkpoint / name).write_bytes(whole)
    (checkpoint / MANIFEST).unlink()
    run_sft('--max_steps', '8', '--resume_from_checkpoint', str(checkpoint), expect=2)
    assert f'it has no {MANIFEST}, which is written last: it is incomplete' in problems()[-1]
    assert len(problems()) == 4


@pytest.mark.slow
def test_a_run_that_has_ended_is_not_resumed(run_sft: Run, problems: Problems) -> None:
    run = run_sft('--max_steps', '3')
    run_sft('--max_steps', '3', '--resume_from_checkpoint', str(run / 'checkpoint-3'), expect=2)
    assert 'no step is left to train. The checkpoint is of step 3, and this run ends at step 3.' in problems()[0]


@pytest.mark.slow
def test_one_checkpoint_is_left_of_a_limit_of_one(run_sft: Run) -> None:
    run = run_sft('--save_total_limit', '1', '--learning_rate', '0.5', '--eval_steps', '2')
    best = json.loads((run / 'run.json').read_text())['best_checkpoint']
    assert [str(p) for p in all_checkpoints(run)] == [best]


@pytest.mark.slow
@pytest.mark.parametrize('sft_type', ['lora', 'full'])
def test_no_run_folder_holds_a_pickle(sft_type: str, run_sft: Run) -> None:
    run = run_sft('--sft_type', sft_type, '--only_save_model', 'false', '--max_steps', '3')
    files = [p for p in run.rglob('*') if p.is_file()]
    assert len(files) > 15 and not [p for p in files if p.suffix in PICKLE_SUFFIXES]
    assert not [p for p in files if p.read_bytes()[:2] in (b'\x80\x02', b'\x80\x04', b'PK')]


@pytest.mark.slow
def test_weights_saved_in_another_layout_are_resumed(run_sft: Run, tmp_path: Path, tokenizer: Any) -> None:
    """The experts of a mixture are one tensor in memory and separate tensors in the file."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=5,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / 'moe')
    tokenizer.save_pretrained(tmp_path / 'moe')
    flags = ('--model_id_or_path', str(tmp_path / 'moe'), '--sft_type', 'full', '--only_save_model', 'false')
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')


@pytest.mark.slow
def test_what_a_killed_run_left_half_written_is_named(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = run_sft('--max_steps', '3')
    (run / '.checkpoint-9.partial').mkdir()
    run_sft('--max_steps', '4', '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    assert f'{run / ".checkpoint-9.partial"} was being written when that run ended' in caplog.text
    assert json.loads((run / 'proofs.json').read_text())['checkpoints'] == {
        'passed': True, 'pickled_by_deepspeed': [],
        'says': 'checkpoint-3 was renamed into place once it was complete on disk, with the sha256 of its files',
    }  # fmt: skip


DISK_FULL = """
import resource, sys
import llm_sft
from utils.train.checkpoints import Checkpoints

write, limited_from = Checkpoints.write, sys.argv[1]

def limited(self, checkpoint, **keywords):
    if checkpoint.name == limited_from:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
    return write(self, checkpoint, **keywords)

Checkpoints.write = limited
sys.exit(llm_sft.main(sys.argv[2:]))
"""


def run_on_a_full_disk(words: list[str], limited_from: str) -> subprocess.CompletedProcess[str]:
    """Train in a process that cannot write a file above 16 KiB from the given checkpoint on."""
    return subprocess.run(
        [sys.executable, '-c', DISK_FULL, limited_from, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_full_disk_loses_nothing_older(model_dir: Path, data_file: Path, tmp_path: Path, run_sft: Run) -> None:
    words = [*small_flags(model_dir, data_file, tmp_path / 'full'), '--save_total_limit', '1']
    done = run_on_a_full_disk(words, 'checkpoint-6')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr[-3000:]
    (run,) = (tmp_path / 'full').glob('*/*')
    assert [p.name for p in run.iterdir() if 'checkpoint' in p.name] == ['checkpoint-3']
    assert damage(run / 'checkpoint-3') is None
    assert len(re.findall(r'(?<!I/O )error: ', done.stderr)) == 1
    assert re.search(
        rf'{run}/checkpoint-6 could not be written: .*File too large.*No older checkpoint was changed\. The last '
        rf'complete checkpoint of this run is {run}/checkpoint-3\. The disk has .* GiB free\. If this is too little, '
        rf'delete files\. Then use --resume_from_checkpoint {run}/checkpoint-3$',
        done.stderr,
        flags=re.MULTILINE,
    )
    resumed = run_sft('--save_total_limit', '1', '--resume_from_checkpoint', str(run / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', run_sft() / 'checkpoint-6')


@pytest.mark.slow
def test_an_unwritable_disk_shows_before_the_first_step(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    done = run_on_a_full_disk(small_flags(model_dir, data_file, tmp_path / 'full'), 'checkpoint-0')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr[-3000:]
    (run,) = (tmp_path / 'full').glob('*/*')
    assert f'error: {run}: a checkpoint cannot be written: ' in done.stderr and 'File too large' in done.stderr
    assert not [p for p in run.iterdir() if 'checkpoint' in p.name or p.name == '.preflight']


@pytest.mark.slow
def test_optimizer_flags_typed_on_resuming_are_used(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    """With a constant schedule the rate of each step is the typed one; weight decay changes weights, so they differ."""
    flags = ('--lr_scheduler_type', 'constant', '--learning_rate', '0.01', '--weight_decay', '0')
    run = run_sft(*flags)
    resumed = ('--resume_from_checkpoint', str(run / 'checkpoint-3'))
    ends = {}
    typed = {
        'learning_rate': '0.02', 'weight_decay': '0.5', 'max_grad_norm': '0.001', 'adam_beta1': '0.5',
        'adam_beta2': '0.5', 'adam_epsilon': '0.01',
    }  # fmt: skip
    for name, value in typed.items():
        other = run_sft(*flags, *resumed, f'--{name}', value)
        assert f'--{name} is {float(value)}, the run that is resumed had' in caplog.text
        assert json.loads((other / 'sft_args.json').read_text())[name] == float(value)
        ends[name] = hashes(other / 'checkpoint-6')['adapter_model.safetensors']
        rates = [line['learning_rate'] for line in log_lines(other / 'checkpoint-6') if 'loss' in line]
        assert rates == [0.01] * 3 + [float(value) if name == 'learning_rate' else 0.01] * 3
    ends['as it was'] = hashes(run / 'checkpoint-6')['adapter_model.safetensors']
    assert len(set(ends.values())) == 7


@pytest.mark.slow
def test_the_rate_after_resuming_is_that_of_the_schedule_typed_now(run_sft: Run) -> None:
    run = run_sft('--lr_scheduler_type', 'constant', '--learning_rate', '0.01')
    resumed = run_sft(
        '--lr_scheduler_type', 'linear', '--warmup_ratio', '0', '--resume_from_checkpoint', str(run / 'checkpoint-3')
    )
    rates = [line['learning_rate'] for line in log_lines(resumed / 'checkpoint-6') if 'loss' in line]
    assert rates[3:] == pytest.approx([0.01 * (6 - step) / 6 for step in (3, 4, 5)])


@pytest.mark.slow
def test_another_optimizer_is_refused_on_resuming(run_sft: Run, problems: Problems) -> None:
    run = run_sft('--max_steps', '3')
    resumed = ('--resume_from_checkpoint', str(run / 'checkpoint-3'))
    run_sft('--optim', 'sgd', *resumed, expect=2)
    assert problems() == [
        '--optim sgd: the state of the resumed optimizer was written with --optim adamw_torch. '
        'Type --optim adamw_torch, or leave --resume_from_checkpoint out to start a new run.'
    ]
    assert (run_sft('--optim', 'adamw_torch_fused', *resumed) / 'run.json').is_file()


def test_deepspeed_cannot_be_resumed_with_other_optimizer_flags() -> None:
    kept: dict[str, Any] = {'optim': 'adamw_torch', 'learning_rate': 0.1, 'weight_decay': 0.0}
    kept |= {'adam_beta1': 0.9, 'adam_beta2': 0.999, 'adam_epsilon': 1e-8}
    kept |= {'deepspeed_config_path': 'ds_config/zero2.json', 'full_weights': 'fp32'}
    problems = CollectedProblems()
    _check_resumed_optimizer(kept, {**kept, 'learning_rate': 0.2, 'adam_beta2': 0.99}, problems)
    assert [problem.split(':')[0] for problem in problems.found] == ['--learning_rate 0.2', '--adam_beta2 0.99']
