"""Full fine-tuning with weights in bf16 (--full_weights bf16): rounding, optimizer, whole runs and their limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import assert_equal, history, weights
from utils.base.errors import Problems
from utils.run.record import _check_resumed_optimizer
from utils.train import bf16_adamw
from utils.train.bf16_adamw import BF16AdamW, round_randomly
from utils.train.state import load_tree, save_tree

Run = Callable[..., Path]
BF16 = ('--dtype', 'bf16', '--sft_type', 'full', '--full_weights', 'bf16', '--only_save_model', 'false')


def test_over_all_noise_the_mean_of_the_rounded_numbers_is_the_exact_number() -> None:
    """Each of the 65536 noise values occurs once, so the mean has no statistical error."""
    noise = torch.arange(2**16, dtype=torch.int32)
    for number in (1.0, 1.00123, -0.7123456, 3.1e-30, -2.9e30, 0.0, 1e-40):
        exact = torch.full((2**16,), number)
        rounded = round_randomly(exact.clone(), noise).double()
        assert rounded.mean().item() == exact[0].double().item()
        assert set(rounded.tolist()) <= {low_neighbour(exact[0]), high_neighbour(exact[0])}


def low_neighbour(exact: torch.Tensor) -> float:
    """Return the nearest bf16 number that is not farther from 0."""
    return float((exact.view(torch.int32) & -65536).view(torch.float32))


def high_neighbour(exact: torch.Tensor) -> float:
    """Return the next bf16 number after `low_neighbour`, away from 0."""
    return float(((exact.view(torch.int32) & -65536) + 65536).view(torch.float32))


def test_numbers_that_bf16_has_are_never_changed() -> None:
    exact = torch.randn(1000).bfloat16()
    noise = torch.randint(0, 2**16, (1000,), dtype=torch.int32)
    assert torch.equal(round_randomly(exact.float(), noise), exact)


def one_parameter(start: torch.Tensor, **settings: Any) -> tuple[torch.nn.Parameter, BF16AdamW]:
    parameter = torch.nn.Parameter(start.clone())
    return parameter, BF16AdamW([parameter], **{'lr': 1e-3, 'weight_decay': 0.1, **settings})


def test_an_update_below_the_spacing_of_bf16_is_kept_on_average() -> None:
    """The rate is a 1/20 of the spacing at 1, so rounding to the nearest number would never move a weight.

    The sum of 4000 x 20 draws with probability 0.05 has a standard deviation of 62 spacings around 4000.
    """
    rate = 2**-8 / 20
    parameter, optimizer = one_parameter(torch.full((4000,), 1.5).bfloat16(), lr=rate, weight_decay=0.0)
    for _ in range(20):
        parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.step()
    moved = (parameter.detach().double() - 1.5).sum().item() / 2**-7
    assert abs(moved - 4000 / 2) < 5 * math.sqrt(4000 * 20 * 0.025 * 0.975)
    assert parameter.detach().unique().numel() > 2


def test_words_of_different_parts_and_steps_are_uniform_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_adamw, 'STEP_CHUNK', 2**16)
    _, optimizer = one_parameter(torch.zeros(2).bfloat16(), seed=3)
    like = torch.zeros(2**16)
    drawn = {key: optimizer._random_words(*key, like) & 0xFFFF for key in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0))}
    for words in drawn.values():
        assert int(words.min()) >= 0 and int(words.max()) < 2**16
        assert abs(words.double().mean().item() / 2**16 - 0.5) < 5 / math.sqrt(12 * 2**16)
    first, *others = drawn.values()
    for words in others:
        assert float((first == words).double().mean()) < 0.001


def test_steps_equal_adamw_by_hand_up_to_the_rounding() -> None:
    """Moments and weight are computed by hand in fp64 from what the step before stored."""
    torch.manual_seed(0)
    parameter, optimizer = one_parameter(torch.randn(7, 5).bfloat16())
    mean, square = torch.zeros(7, 5).double(), torch.zeros(7, 5).double()
    for step in (1, 2, 3):
        before = parameter.detach().double()
        parameter.grad = torch.randn(7, 5).bfloat16()
        gradient = parameter.grad.double()
        optimizer.step()

        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        wanted = before * (1 - 1e-3 * 0.1) - 1e-3 * (mean / (1 - 0.9**step)) / (
            (square / (1 - 0.999**step)).sqrt() + 1e-8
        )
        state = optimizer.state[parameter]
        assert state['step'] == step and state['exp_avg'].dtype == torch.bfloat16
        torch.testing.assert_close(state['exp_avg_sq'].double(), square, rtol=1e-5, atol=1e-12)
        for found, exact in ((parameter.detach(), wanted), (state['exp_avg'], mean)):
            apart = (found.double() - exact).abs()
            assert bool((apart <= exact.abs() * 2**-7 * 1.001).all()) and float(apart.max()) > 0
        mean = state['exp_avg'].double()


def test_a_weight_in_fp32_is_updated_as_by_torch() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 4)
    parameter, optimizer = one_parameter(start)
    plain = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        parameter.grad = torch.randn(3, 4)
        plain.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(parameter, plain, rtol=1e-6, atol=1e-7)


def test_the_size_of_chunks_and_a_weight_with_other_strides_change_no_exact_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 50)
    gradient = torch.randn(6, 50)
    ends = []
    for chunk, source in ((2**21, start), (7, start), (7, start.t().contiguous().t())):
        monkeypatch.setattr(bf16_adamw, 'STEP_CHUNK', chunk)
        parameter, optimizer = one_parameter(source)
        parameter.grad = gradient.clone()
        optimizer.clip(0.5)
        optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
    assert torch.equal(ends[1], ends[2])


def test_clipping_is_exact_and_leaves_the_gradients() -> None:
    """torch computes the norm of bf16 gradients in bf16 and rounds each clipped gradient."""
    torch.manual_seed(0)
    parameter, optimizer = one_parameter(torch.zeros(300, 10).bfloat16())
    parameter.grad = torch.randn(300, 10).bfloat16()
    kept = parameter.grad.clone()
    norm = optimizer.clip(1.0)
    assert float(norm) == pytest.approx(float(kept.double().norm()), rel=1e-6)
    optimizer.step()
    assert torch.equal(parameter.grad, kept)
    square = optimizer.state[parameter]['exp_avg_sq'].double()
    torch.testing.assert_close(square, 0.001 * (kept.double() / kept.double().norm()) ** 2, rtol=1e-5, atol=0)
    optimizer.clip(1e9)
    optimizer.step()
    square = 0.999 * square + 0.001 * kept.double() ** 2
    torch.testing.assert_close(optimizer.state[parameter]['exp_avg_sq'].double(), square, rtol=1e-5, atol=0)


def test_a_loaded_state_continues_bitwise(tmp_path: Path) -> None:
    """The base class of torch would cast the second moments to bf16."""
    torch.manual_seed(0)
    start = torch.randn(40, 30).bfloat16()
    gradients = torch.randn(6, 40, 30).bfloat16()
    whole, optimizer = one_parameter(start)
    for gradient in gradients[:3]:
        whole.grad = gradient.clone()
        optimizer.step()
    save_tree(tmp_path / 'state.safetensors', optimizer.state_dict())
    resumed, restored = one_parameter(whole.detach())
    restored.load_state_dict(load_tree(tmp_path / 'state.safetensors'))
    for parameter, own in ((whole, optimizer), (resumed, restored)):
        for gradient in gradients[3:]:
            parameter.grad = gradient.clone()
            own.step()
    assert torch.equal(whole, resumed)
    for name in ('exp_avg', 'exp_avg_sq'):
        assert torch.equal(optimizer.state[whole][name], restored.state[resumed][name])
    assert restored.state[resumed]['exp_avg_sq'].dtype == torch.float32


def test_ten_bytes_per_parameter() -> None:
    parameter, optimizer = one_parameter(torch.randn(100, 10).bfloat16())
    parameter.grad = torch.randn(100, 10).bfloat16()
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in (parameter, parameter.grad, *state)) == 10 * parameter.numel()


def test_the_sum_of_bf16_gradients_is_close_to_the_gradient_of_the_joined_batch() -> None:
    """The documented figure: with 16 summands the error is below 1 % of the norm."""
    torch.manual_seed(0)
    rows, targets = torch.randn(64, 32).bfloat16(), torch.randn(64, 8).bfloat16()

    def gradient(size: int, dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(1)
        layer = torch.nn.Linear(32, 8, bias=False).to(torch.bfloat16).to(dtype)
        for part in range(0, 64, size):
            inputs, wanted = (x[part : part + size].to(dtype) for x in (rows, targets))
            ((layer(inputs) - wanted).square().sum() / 64).backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.double()

    exact = gradient(64, torch.float32)
    joined, summed = (float((gradient(size, torch.bfloat16) - exact).norm() / exact.norm()) for size in (64, 4))
    assert joined < 5e-3 and summed < 1e-2


def last_loss(run: Path) -> float:
    return next(float(line['eval_loss']) for line in reversed(history(run, 16)) if 'eval_loss' in line)


@pytest.mark.slow
def test_the_loss_is_that_of_fp32_weights(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The loss of both falls by a fifth or more, and they end within 2 % of each other."""
    flags = ('--sft_type', 'full', '--dtype', 'bf16', '--max_steps', '16', '--eval_steps', '16')
    exact = run_sft(*flags)
    rounded = run_sft(*flags, '--full_weights', 'bf16')
    assert 'weights are stored in bfloat16 and rounded stochastically: 10 bytes per parameter' in caplog.text
    first = next(line['loss'] for line in history(exact, 16) if 'loss' in line)
    assert last_loss(exact) < 0.8 * first
    assert last_loss(rounded) == pytest.approx(last_loss(exact), rel=0.02)
    stored = {tensor.dtype for tensor in weights(rounded, 16).values()}
    assert stored == {torch.bfloat16} and {tensor.dtype for tensor in weights(exact, 16).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags', [(), ('--packing', 'true'), ('--gradient_checkpointing', 'true'), ('--padding_free', 'false')]
)
def test_a_resumed_run_equals_the_uninterrupted_one(flags: tuple[str, ...], run_sft: Run) -> None:
    whole = run_sft(*BF16, *flags)
    resumed = run_sft(*BF16, *flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')


@pytest.mark.slow
def test_gradient_checkpointing_trains_the_same_bits(run_sft: Run) -> None:
    plain, checkpointed = (run_sft(*BF16, '--gradient_checkpointing', value) for value in ('false', 'true'))
    first, second = weights(plain, 6), weights(checkpointed, 6)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_checkpoint_is_served_in_its_dtype_and_repeated(run_sft: Run, tmp_path: Path) -> None:
    import llm_infer
    import llm_sft

    run = run_sft(*BF16)
    recorded = json.loads((run / 'sft_args.json').read_text())
    assert (recorded['full_weights'], recorded['dtype']) == ('bf16', 'bf16')
    answers = tmp_path / 'answers.jsonl'
    words = ['--ckpt_dir', str(run / 'checkpoint-6'), '--result_path', str(answers), '--max_new_tokens', '4']
    assert llm_infer.main(words) == 0 and answers.is_file()
    assert llm_sft.main(['--from_run', str(run), '--output_dir', str(tmp_path / 'again')]) == 0
    (again,) = (tmp_path / 'again').glob('*/v*')
    first, second = weights(run, 6), weights(again, 6)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_fp32_weights_are_not_resumed_in_bf16(run_sft: Run, problems: Callable[[], list[str]]) -> None:
    run = run_sft('--sft_type', 'full', '--dtype', 'bf16', '--only_save_model', 'false', '--max_steps', '3')
    run_sft(*BF16, '--resume_from_checkpoint', str(run / 'checkpoint-3'), expect=2)
    said = (
        '--full_weights bf16: the state of the resumed optimizer was written with --full_weights fp32. '
        'Type --full_weights fp32, or leave --resume_from_checkpoint out to start a new run.'
    )
    assert problems() == [said]
    before_the_flag: dict[str, Any] = {'optim': 'adamw_torch', 'deepspeed_config_path': None}
    collected = Problems()
    _check_resumed_optimizer(before_the_flag, {**before_the_flag, 'full_weights': 'bf16'}, collected)
    assert collected.found == [said]


REFUSED = [
    (('--sft_type', 'lora'), '--full_weights bf16 needs --sft_type full, got lora'),
    (('--fsdp', 'true'), '--full_weights bf16 and --fsdp true: stochastic rounding needs whole weights'),
    (('--deepspeed_config_path', 'ds_config/zero2.json'), '--full_weights bf16 and --deepspeed_config_path: stoch'),
    (('--optim', 'adamw_8bit'), '--optim adamw_8bit rounds bf16 weights to the nearest number'),
    (('--dtype', 'fp16'), '--full_weights bf16 computes in bf16, but --dtype is fp16. Use --dtype bf16'),
    (('--dtype', 'fp32'), '--full_weights bf16 computes in bf16, but --dtype is fp32. Use --dtype bf16'),
]


@pytest.mark.parametrize(('flags', 'said'), REFUSED)
def test_what_cannot_be_combined_is_named(
    flags: tuple[str, ...], said: str, run_sft: Run, problems: Callable[[], list[str]]
) -> None:
    run_sft(*BF16, *flags, expect=2)
    assert any(text.startswith(said) for text in problems())


def test_what_is_decided_and_warned_of(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    from utils.cli.arguments import SftArguments
    from utils.cli.parser import parse
    from utils.cli.resolve import resolve_sft

    def resolved(*words: str) -> Any:
        return resolve_sft(parse(SftArguments, words, program='x', about='x'))

    full = ('--sft_type', 'full', '--full_weights', 'bf16')
    done = resolved(*full, '--gradient_accumulation_steps', '65')
    assert not done.problems.found and done.args.dtype == 'bf16'
    assert 'dtype = bf16 because --full_weights bf16 computes in bf16' in done.decisions
    assert any('more than 64 summands lose precision' in text for text in done.warnings)
    assert not any('summands' in text for text in resolved(*full, '--gradient_accumulation_steps', '64').warnings)
    assert '--full_weights has no effect: it is for --sft_type full.' in resolved('--full_weights', 'fp32').warnings
