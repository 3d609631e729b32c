"""Training with the program itself on tiny models: losses fall, runs resume, batch layouts agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.support.runs import history, weights, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer

Run = Callable[..., Path]


def test_run_folder_holds_what_is_promised(run_sft: Run) -> None:
    run = run_sft('--system', 'be kind', '--eval_steps', '2')
    losses = [e['loss'] for e in history(run, 6) if 'loss' in e]
    assert losses[-1] < losses[0]
    args = json.loads((run / 'sft_args.json').read_text())
    assert args['learning_rate'] == 0.01 and args['template_type'] == 'auto' and args['system'] == 'be kind'
    assert args['system_typed'] is True and len(args['base_model']['sha256']) == 64
    record = json.loads((run / 'run.json').read_text())
    assert record['steps'] == 6 and record['train_tokens_per_second'] > 0 and record['peak_memory_gib'] > 0.05
    assert record['versions']['torch'] == version('torch')  # wheels with CUDA: without the +cu132 of torch.__version__
    assert record['data']['train']['rows'] == 36 and record['data']['validation']['rows'] == 4
    assert {p.name for p in (run / 'images').iterdir()} == {
        'loss.png', 'grad_norm.png', 'learning_rate.png', 'eval_loss.png', 'eval_acc.png',
        'eval_drift_kl.png',
    }  # fmt: skip
    assert list((run / 'runs').glob('events.out.tfevents*'))
    kept = sorted(p.name for p in run.glob('checkpoint-*'))
    assert kept == ['checkpoint-4', 'checkpoint-6']
    checkpoint = run / 'checkpoint-6'
    assert {
        'adapter_model.safetensors',
        'adapter_config.json',
        'sft_args.json',
        'tokenizer.json',
        'optimizer.safetensors',
    } <= {p.name for p in checkpoint.iterdir()}
    assert (run / 'sample.txt').read_text(encoding='utf-8').startswith('<|im_start|>system\nbe kind<|im_end|>')
    assert not list(run.rglob('training_args.bin'))
    assert (run / 'training_args.json').is_file()


@pytest.mark.slow
def test_folders_count_up(run_sft: Run) -> None:
    names = [run_sft('--max_steps', '1').name.split('-')[0] for _ in range(2)]
    assert names == ['v0', 'v1']


@pytest.mark.slow
@pytest.mark.parametrize('sft_type', ['lora', 'full'])
def test_resumed_run_equals_the_uninterrupted_one(run_sft: Run, sft_type: str) -> None:
    flags = ('--sft_type', sft_type, '--only_save_model', 'false', '--lora_dropout_p', '0.1')
    flags = flags if sft_type == 'lora' else flags[:4]
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert history(resumed, 6) == history(whole, 6)
    expected = weights(whole, 6)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(resumed, 6).items())


def first_step(run: Path) -> tuple[float, float]:
    entry = next(e for e in history(run, 1) if 'loss' in e)
    return entry['loss'], entry['grad_norm']


@pytest.mark.slow
def test_batch_layouts_give_the_same_loss_and_gradients(run_sft: Run, tmp_path: Path) -> None:
    rows = [{'query': 'x' * n, 'response': 'yes ' * (n % 7 + 1)} for n in (3, 40, 9, 60)]
    data = write_jsonl(tmp_path / 'four.jsonl', rows)
    common = (
        '--dataset', str(data), '--dataset_test_ratio', '0', '--max_steps', '1', '--save_steps', '1',
        '--max_grad_norm', '0',
    )  # fmt: skip
    layouts = [(4, 1), (1, 4), (2, 2)]
    found = [
        first_step(run_sft(*common, '--batch_size', str(b), '--gradient_accumulation_steps', str(a)))
        for b, a in layouts
    ]
    for loss, norm in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        assert norm == pytest.approx(found[0][1], abs=1e-5)


@pytest.mark.slow
def test_validation_loss_is_the_same_whatever_the_batch(run_sft: Run) -> None:
    found = []
    for size in ('1', '3'):
        run = run_sft('--max_steps', '1', '--eval_batch_size', size, '--dataset_test_ratio', '0.2')
        found.append(next(e for e in history(run, 1) if 'eval_loss' in e))
    assert found[0]['eval_loss'] == pytest.approx(found[1]['eval_loss'], abs=1e-6)
    assert found[0]['eval_acc'] == found[1]['eval_acc']


@pytest.mark.slow
def test_pretraining_rows_train(run_sft: Run, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / 'text.jsonl', [{'query': '', 'response': 'the answer is 42. ' * 3}] * 20)
    run = run_sft('--dataset', str(data), '--template_type', 'default-generation')
    losses = [e['loss'] for e in history(run, 6) if 'loss' in e]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(run_sft: Run) -> None:
    plain, checkpointed = (
        run_sft('--max_steps', '3', '--gradient_checkpointing', value) for value in ('false', 'true')
    )
    a, b = weights(plain, 3), weights(checkpointed, 3)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-6


@pytest.mark.slow
def test_evaluation_by_generation(run_sft: Run) -> None:
    run = run_sft('--predict_with_generate', 'true', '--max_new_tokens', '8', '--do_sample', 'false')
    entry = next(e for e in history(run, 6) if 'eval_rouge-l' in e)
    assert {'eval_rouge-1', 'eval_rouge-2', 'eval_rouge-l', 'eval_bleu-4'} <= set(entry)
    assert (run / 'images' / 'eval_rouge-l.png').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['last_round', 'all_rounds'])
def test_answers_are_scored_against_the_last_reply_alone(
    scope: str, run_sft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that repeats each last reply word for word scores 100, even if earlier replies carry loss."""
    rows = [
        [('user', f'hi {i}'), ('assistant', 'hello there, good day'), ('user', 'what is 6 times 7?')] for i in range(8)
    ]
    talks = [
        {
            'messages': [
                *({'role': role, 'content': text} for role, text in row),
                # Every second reply is marked to carry no loss; it is still the reference for the answer.
                {'role': 'assistant', 'content': 'the answer is 42.', 'weight': int(i % 2)},
            ]
        }
        for i, row in enumerate(rows)
    ]
    flags = ['--dataset', str(write_jsonl(tmp_path / 'talks.jsonl', talks)), '--dataset_test_ratio', '0.5']
    reply = make_tokenizer()('the answer is 42.', add_special_tokens=False)['input_ids']
    monkeypatch.setattr(
        'utils.train.trainer.generate_batch', lambda model, prompts, *args, **kwargs: [reply for _ in prompts]
    )
    run = run_sft(*flags, '--loss_scope', scope, '--predict_with_generate', 'true', '--max_steps', '1')
    scores = next(entry for entry in history(run, 1) if 'eval_rouge-l' in entry)
    assert scores['eval_rouge-l'] == scores['eval_bleu-4'] == 100


@pytest.mark.slow
def test_longest_rows_come_first_when_memory_is_tested(run_sft: Run, tmp_path: Path) -> None:
    from utils.data.encode_plan import EncodedRows
    from utils.encode.encoded import Encoded

    rows = EncodedRows()
    for n in (3, 9, 5, 1):
        rows.append(Encoded(input_ids=[7] * n, trained=(0, n), prompt_length=0))
    assert rows.longest_first().lengths() == [9, 5, 3, 1]
    assert rows[1] == {'input_ids': [7] * 9, 'trained': (0, 9), 'prompt_length': 0, 'row': 1}
    run = run_sft('--test_oom_error', 'true', '--max_steps', '1')
    assert (run / 'checkpoint-1').is_dir()


def test_the_fullest_packs_come_first_when_memory_is_tested() -> None:
    from utils.cli.arguments import SftArguments
    from utils.data.encoded_rows import EncodedRows
    from utils.data.packing import PackedRows
    from utils.encode.encoded import Encoded
    from utils.train.trainer import _arranged

    rows = EncodedRows()
    for n in (1, 8, 8, 3, 6, 5):
        rows.append(Encoded(input_ids=[7] * n, trained=(0, n), prompt_length=0))
    assert PackedRows(rows, 9).lengths() == [9, 8, 9, 5]
    args = SftArguments(packing=True, max_length=9, test_oom_error=True)
    assert _arranged(rows, args, 0).lengths() == [9, 9, 8, 5]


@pytest.mark.slow
def test_only_save_model_leaves_nothing_to_resume(run_sft: Run, problems: Callable[[], list[str]]) -> None:
    run = run_sft('--only_save_model', 'true', '--max_steps', '1')
    assert not (run / 'checkpoint-1' / 'optimizer.safetensors').exists()
    run_sft('--resume_from_checkpoint', str(run / 'checkpoint-1'), expect=2)
    assert any('has no optimizer state' in line for line in problems())


@pytest.mark.slow
def test_lora_all_reaches_every_linear_layer_but_the_head(run_sft: Run) -> None:
    run = run_sft('--lora_target_modules', 'ALL', '--max_steps', '1')
    targets = json.loads((run / 'checkpoint-1' / 'adapter_config.json').read_text())['target_modules']
    assert sorted(targets) == ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']


def test_unknown_lora_target_names_the_near_ones(run_sft: Run, problems: Callable[[], list[str]]) -> None:
    run_sft('--lora_target_modules', 'q_prj', expect=2)
    assert any("'q_prj' matches no linear layer" in line and "'q_proj'" in line for line in problems())


@pytest.mark.slow
def test_resuming_with_other_arguments_is_warned_about(run_sft: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = run_sft('--max_steps', '3', '--eval_steps', '2')
    caplog.clear()
    resumed = ('--resume_from_checkpoint', str(run / 'checkpoint-2'))
    run_sft('--max_steps', '3', '--eval_steps', '2', *resumed, '--seed', '1')
    assert '--seed is 1, the run that is resumed had 42' in caplog.text
    assert caplog.text.count('the run that is resumed had') == 1


@pytest.mark.slow
def test_resuming_on_other_base_weights_is_refused(
    run_sft: Run, tmp_path: Path, problems: Callable[[], list[str]]
) -> None:
    run = run_sft('--max_steps', '1')
    other = tmp_path / 'other'
    make_model(seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    run_sft('--model_id_or_path', str(other), '--resume_from_checkpoint', str(run / 'checkpoint-1'), expect=2)
    assert 'the base weights differ' in problems()[0]


@pytest.mark.slow
def test_max_steps_below_1_trains_whole_epochs(run_sft: Run) -> None:
    for steps, wanted in (('-1', 9), ('2', 2)):
        run = run_sft('--max_steps', steps, '--num_train_epochs', '1')
        assert json.loads((run / 'run.json').read_text())['steps'] == wanted
