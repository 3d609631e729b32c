"""--adapter: new rows and a new schedule on a trained adapter, its shape, base, template and lineage."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_infer
import llm_sft
from tests.support.runs import ROOT, assert_equal, log_lines, small_flags, weights, write_jsonl
from tests.support.tiny_models import make_model
from utils.cli.arguments import SftArguments
from utils.export.model_card import model_card
from utils.loading.adapter import load_adapter
from utils.model import MODEL_MAPPING, load_model
from utils.run.record import RunRecord
from utils.train import trainer as trainer_module
from utils.train.prepare import prepare_model

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
ADAPTER = 'adapter_model.safetensors'
SHAPE = ('--lora_rank', '4', '--lora_alpha', '8', '--use_rslora', 'true', '--lora_target_modules', 'q_proj', 'v_proj')
NEW_ROWS = [{'query': f'which is {i}?', 'response': f'it is {i} of {i % 3}'} for i in range(30)]


@pytest.fixture(scope='module')
def first(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a run with checkpoint-3 and checkpoint-6. Tests must not change it."""
    output = tmp_path_factory.mktemp('first')
    words = [*small_flags(model_dir, data_file, output), '--save_total_limit', '-1', '--template_type', 'chatml']
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        patch.setenv('ASSAY_CACHE', str(output / 'cache'))
        assert llm_sft.main([*words, *SHAPE, '--report_samples', '2']) == 0
    (run,) = output.glob('tiny-llama/*')
    return Path(run)


@pytest.fixture
def new_rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / 'new.jsonl', NEW_ROWS)


def copied(run: Path, tmp_path: Path, *, plain: bool = False) -> Path:
    """Return a copy of checkpoint-6, with the record of its run unless `plain`, without a manifest."""
    folder = Path(shutil.copytree(run / 'checkpoint-6', tmp_path / 'copy' / 'checkpoint-6'))
    (folder / 'manifest.json').unlink()
    if plain:
        (folder / 'sft_args.json').unlink()
    return folder


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / 'adapter_config.json').read_text())
    (folder / 'adapter_config.json').write_text(json.dumps({**config, **values}))


@pytest.mark.slow
def test_a_run_starts_from_the_tensors_of_the_adapter(
    first: Path, run_sft: Run, new_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import get_peft_model_state_dict

    started: dict[str, torch.Tensor] = {}
    build = trainer_module.build_trainer

    def noted(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        state = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
        started.update({name: tensor.clone() for name, tensor in state.items()})
        return trainer

    monkeypatch.setattr(trainer_module, 'build_trainer', noted)
    given = first / 'checkpoint-6'
    run = run_sft('--dataset', str(new_rows), '--adapter', str(given), '--warmup_ratio', '0', '--max_steps', '4')
    stored = load_file(given / ADAPTER)
    assert started.keys() == stored.keys() and all(torch.equal(started[name], stored[name]) for name in stored)

    lines = log_lines(run / 'checkpoint-4')
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4]
    assert lines[0]['learning_rate'] == 0.01, 'a new schedule'
    config = json.loads((run / 'checkpoint-4' / 'adapter_config.json').read_text())
    assert (config['r'], config['lora_alpha'], config['use_rslora']) == (4, 8, True)
    assert sorted(config['target_modules']) == ['q_proj', 'v_proj']
    changed = weights(run, 4)
    assert any(not torch.equal(changed[name], stored[name]) for name in stored)

    flags = json.loads((run / 'sft_args.json').read_text())
    assert (flags['lora_rank'], flags['lora_alpha'], flags['use_rslora']) == (4, 8, True)
    assert flags['template_type'] == 'chatml', 'the template of the run of the adapter'
    decisions = json.loads((run / 'run.json').read_text())['decisions']
    for line in (
        'lora_rank = 4 because the adapter has it',
        'lora_target_modules = q_proj,v_proj because the adapter has it',
        'template_type = chatml because the adapter was trained with it',
    ):
        assert line in decisions
    assert not any('all-linear' in line for line in decisions)
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-4'), '--merge_lora_and_save', 'true']) == 0
    assert json.loads((run / 'proofs.json').read_text())['merge']['passed']


@pytest.mark.slow
def test_the_first_loss_is_that_of_resuming(run_sft: Run) -> None:
    """Each step takes all rows, so step 3 of a resumed run and step 1 of a new run have the same rows."""
    flags = ('--batch_size', '36', '--gradient_accumulation_steps', '1', '--eval_steps', '1', '--lora_dropout_p', '0')
    run = run_sft(*flags, '--max_steps', '2')
    resumed = run_sft(*flags, '--max_steps', '3', '--resume_from_checkpoint', str(run / 'checkpoint-2'))
    started = run_sft(*flags, '--max_steps', '1', '--adapter', str(run / 'checkpoint-2'))
    (third,) = [line['loss'] for line in log_lines(resumed / 'checkpoint-3') if line['step'] == 3 and 'loss' in line]
    assert log_lines(started / 'checkpoint-1')[0]['loss'] == pytest.approx(third, abs=1e-5)
    untrained = log_lines(run / 'checkpoint-1')[0]['loss']
    assert abs(untrained - third) > 1e-3


@pytest.mark.slow
def test_the_answers_before_are_those_of_the_adapter(first: Path, run_sft: Run) -> None:
    run = run_sft('--adapter', str(first / 'checkpoint-6'), '--report_samples', '2', '--max_steps', '1')
    after = [row['after'] for row in json.loads((first / 'answers.json').read_text())]
    before = [row['before'] for row in json.loads((run / 'answers.json').read_text())]
    assert before == after and len(before) == 2


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits_and_keeps_its_lineage(
    first: Path, run_sft: Run, new_rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import os

    from utils.train.trainer import SftTrainer

    flags = ('--dataset', str(new_rows), '--adapter', str(first / 'checkpoint-3'), '--lora_dropout_p', '0.1')
    whole = run_sft(*flags)
    step = SftTrainer.training_step

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and not self.in_preflight:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, 'training_step', signalled)
        stopped = run_sft(*flags, expect=143)
    message = next(r.getMessage() for r in caplog.records if r.getMessage().startswith('stopped by'))
    command = shlex.split(message.splitlines()[1])
    assert '--adapter' not in command
    before = set(stopped.parent.iterdir())
    caplog.clear()
    assert llm_sft.main(command[2:]) == 0
    (resumed,) = set(stopped.parent.iterdir()) - before
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    assert 'the run that is resumed had' not in caplog.text
    assert 'lora_rank = 4 because the checkpoint has it' in caplog.text
    lineages = [json.loads((run / 'lock.json').read_text())['adapter'] for run in (whole, resumed)]
    assert lineages[0] == lineages[1]


@pytest.mark.slow
def test_the_lineage_is_recorded_shown_and_repeated(
    first: Path, run_sft: Run, tmp_path: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    given = Path(shutil.copytree(first, tmp_path / 'stage-1')) / 'checkpoint-6'
    run = run_sft('--adapter', str(given), '--max_steps', '3')
    sha256 = hashlib.sha256((given / ADAPTER).read_bytes()).hexdigest()
    lineage = {'path': '~/stage-1/checkpoint-6', 'sha256': sha256, 'run': 'stage-1', 'base': 'checked'}
    assert json.loads((run / 'lock.json').read_text())['adapter'] == lineage
    assert RunRecord.read(run / 'checkpoint-3').lineage == lineage
    assert f'from the adapter ~/stage-1/checkpoint-6 (sha256 {sha256[:12]}...)' in (run / 'report.html').read_text()
    assert json.loads((run / 'proofs.json').read_text())['secrecy']['passed']
    progress = {'step': 3, 'log_history': [], 'data': {}}
    card = model_card('a', RunRecord.read(run), progress, [])
    assert f'Its training started from an earlier adapter with the sha256 `{sha256}`.' in card
    assert 'stage-1' not in card and '`--adapter`' not in card
    assert 'earlier adapter' not in model_card('a', RunRecord.read(given.parent), progress, [])

    before = set(run.parent.iterdir())
    assert llm_sft.main(['--from_run', str(run)]) == 0
    (repeated,) = set(run.parent.iterdir()) - before
    assert_equal(repeated / 'checkpoint-3', run / 'checkpoint-3')

    (given / 'manifest.json').unlink()
    tensors = load_file(given / ADAPTER)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, given / ADAPTER)
    assert llm_sft.main(['--from_run', str(run)]) == 2
    assert problems()[-1].startswith(
        f'--from_run: the weights of the adapter have changed since that run (sha256 {sha256[:12]} then and '
    )
    assert llm_sft.main(['--from_run', str(run), '--adapter', str(given)]) == 0, 'typed now, it is not compared'


@pytest.mark.slow
def test_typed_flags_that_differ_from_the_adapter_are_refused(first: Path, run_sft: Run, problems: Problems) -> None:
    given = first / 'checkpoint-6'
    flags = ('--adapter', str(given), '--lora_rank', '8', '--lora_alpha', '9', '--use_rslora', 'false')
    run_sft(*flags, '--use_dora', 'true', expect=2)
    assert problems() == [
        f'--{name} {typed}: the adapter {given} was trained with --{name} {has}. Remove --{name}, or train a new '
        'adapter without --adapter.'
        for name, typed, has in (
            ('lora_rank', 8, 4), ('lora_alpha', 9, 8), ('use_dora', 'true', 'false'), ('use_rslora', 'false', 'true'),
        )
    ]  # fmt: skip
    run_sft('--adapter', str(given), '--lora_target_modules', 'q_proj', 'o_proj', expect=2)
    assert problems()[-1] == (
        f'--lora_target_modules q_proj o_proj: these are not the layers of the adapter in {given}. The adapter is on '
        '4 layers (q_proj, v_proj), and the flag selects 4. Remove --lora_target_modules to use the layers of the '
        'adapter, or train a new adapter without --adapter.'
    )
    same = ('--lora_rank', '4', '--lora_target_modules', 're:.*[qv]_proj', '--max_steps', '1')
    assert (run_sft('--adapter', str(given), *same) / 'run.json').is_file()


@pytest.mark.slow
def test_another_base_or_template_is_refused(
    first: Path, run_sft: Run, tmp_path: Path, model_dir: Path, problems: Problems, caplog: pytest.LogCaptureFixture
) -> None:
    given = first / 'checkpoint-6'
    other = Path(shutil.copytree(model_dir, tmp_path / 'other'))
    make_model(seed=1).save_pretrained(other)
    run_sft('--adapter', str(given), '--model_id_or_path', str(other), expect=2)
    assert problems()[-1].startswith(
        f'--adapter {given}: the base weights differ: it was trained on tiny-llama (sha256 '
    )
    assert problems()[-1].endswith('Name them with --model_id_or_path.')

    folder = copied(first, tmp_path)
    record = json.loads((folder / 'sft_args.json').read_text())
    (folder / 'sft_args.json').write_text(json.dumps({**record, 'template_sha256': '0' * 64}))
    run_sft('--adapter', str(folder), expect=2)
    assert (
        "--template_type chatml: the entry 'chatml' of TEMPLATE_MAPPING has changed since checkpoint-6"
        in (problems()[-1])
    )
    run_sft('--adapter', str(folder), '--template_type', 'auto', '--system', 'be kind', '--max_steps', '1')
    assert '--template_type auto is not what the adapter was trained with (chatml).' in caplog.text
    assert "--system 'be kind': the adapter was trained with 'you are a helpful assistant!'." in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['.safetensors', '.bin'])
def test_an_adapter_of_plain_peft_is_accepted_with_a_note(
    suffix: str, first: Path, run_sft: Run, tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(first, tmp_path, plain=True)
    change_config(folder, base_model_name_or_path='someone/Other-Model')
    if suffix == '.bin':
        torch.save(load_file(folder / ADAPTER), folder / 'adapter_model.bin')
        (folder / ADAPTER).unlink()
    run = run_sft('--adapter', str(folder), '--max_steps', '1')
    assert f'--adapter {folder}: it has no record of its run (sft_args.json), so neither its base' in caplog.text
    assert "names the base model 'someone/Other-Model', and this run trains on '" in caplog.text
    lineage = json.loads((run / 'lock.json').read_text())['adapter']
    assert (lineage['run'], lineage['base']) == (None, 'not checked')
    assert json.loads((run / 'sft_args.json').read_text())['template_type'] == 'auto'

    change_config(folder, base_model_name_or_path=str(model_dir))
    caplog.clear()
    run_sft('--adapter', str(folder), '--max_steps', '1')
    assert 'names the base model' not in caplog.text


@pytest.mark.slow
def test_the_base_model_is_that_of_the_adapter_if_none_is_named(
    first: Path, data_file: Path, tmp_path: Path, model_dir: Path
) -> None:
    plain = copied(first, tmp_path, plain=True)
    change_config(plain, base_model_name_or_path=str(model_dir))
    for given in (first / 'checkpoint-6', plain):
        words = small_flags(model_dir, data_file, tmp_path / given.parent.name)
        at = words.index('--model_id_or_path')
        del words[at : at + 2]
        assert llm_sft.main([*words, '--adapter', str(given), '--max_steps', '1']) == 0
        (run,) = (tmp_path / given.parent.name).glob('tiny-llama/*')
        decisions = json.loads((run / 'run.json').read_text())['decisions']
        assert f'model_id_or_path = {model_dir} because the adapter was trained on it' in decisions


HEAD = 'base_model.model.lm_head.weight'
CODE = b"cos\nsystem\n(S'touch hacked'\ntR."
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    'gone': (shutil.rmtree, 'is not a directory (looked in '),
    'no config': (lambda f: (f / 'adapter_config.json').unlink(), 'is not an adapter: it has no adapter_config.json.'),
    'no weights': (lambda f: (f / ADAPTER).unlink(), 'holds no adapter weights: neither adapter_model.safetensors nor'),
    'whole model': (
        lambda f: (f / 'adapter_config.json').rename(f / 'config.json'), 'is a whole model, not an adapter. Name it',
    ),
    'other kind': (lambda f: change_config(f, peft_type='IA3'), 'is an adapter of the kind IA3, and only LoRA'),
    'rank pattern': (
        lambda f: change_config(f, rank_pattern={'q_proj': 2}), 'adapter_config.json sets rank_pattern, which no flag',
    ),
    'no rank': (lambda f: change_config(f, r=None), 'adapter_config.json: r is missing or has the wrong type. Give'),
    'no alpha': (lambda f: change_config(f, lora_alpha='16'), 'adapter_config.json: lora_alpha is missing or has the'),
    'layers of another type': (
        lambda f: change_config(f, target_modules=[1]), 'adapter_config.json: target_modules is missing or has',
    ),
    'a flag of another type': (
        lambda f: (f / 'sft_args.json').write_text('{"sft_type": "lora", "lora_rank": "8"}'),
        'sft_args.json: lora_rank is missing or has the wrong type. Put back the file that the run wrote.',
    ),
    'damaged record': (lambda f: (f / 'sft_args.json').write_text('{'), 'sft_args.json cannot be read as JSON'),
    'a part': (
        lambda f: save_file(dict([*load_file(f / ADAPTER).items()][:-1]), f / ADAPTER),
        'LlamaForCausalLM: 1 missing, for example base_model.model.model.layers.1.self_attn.',
    ),
    'more': (
        lambda f: save_file({**load_file(f / ADAPTER), HEAD: torch.ones(400, 32)}, f / ADAPTER),
        'LlamaForCausalLM: 1 too many, for example base_model.model.lm_head.weight',
    ),
    'code': (
        lambda f: ((f / ADAPTER).unlink(), (f / 'adapter_model.bin').write_bytes(CODE)),
        'it is damaged, or holds more than tensors',
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_started_from_is_refused_with_one_message(
    name: str, first: Path, run_sft: Run, tmp_path: Path, problems: Problems
) -> None:
    spoil, message = BAD[name]
    folder = copied(first, tmp_path)
    spoil(folder)
    run_sft('--adapter', str(folder), expect=2)
    assert len(problems()) == 1 and message in problems()[0], problems()
    assert not Path('hacked').exists()


def test_a_damaged_configuration_is_reported_with_the_other_problems(
    model_dir: Path, data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    folder = tmp_path / 'adapter'
    folder.mkdir()
    (folder / 'adapter_config.json').write_text('{')
    (folder / ADAPTER).touch()
    words = small_flags(model_dir, data_file, tmp_path)
    assert llm_sft.main([*words, '--adapter', str(folder), '--lora_dropout_p', '2']) == 2
    damaged, out_of_range = problems()
    assert 'adapter_config.json cannot be read as JSON' in damaged and '--lora_dropout_p takes' in out_of_range


@pytest.mark.slow
def test_combinations_that_make_no_sense_are_refused(
    first: Path, run_sft: Run, tmp_path: Path, problems: Problems, data_file: Path
) -> None:
    given = first / 'checkpoint-6'
    run_sft('--adapter', str(given), '--resume_from_checkpoint', str(given), expect=2)
    assert len(problems()) == 1
    assert problems()[-1].startswith(f'--adapter {given}: a run that is resumed goes on from the adapter in its check')
    run_sft('--adapter', str(given), '--sft_type', 'full', expect=2)
    assert any(
        line.startswith(f'--adapter {given} is for --sft_type lora. Remove --sft_type full') for line in problems()
    )
    run_sft('--adapter', str(first), expect=2)
    assert problems()[-1] == f'--adapter {first} is a run folder. Give one of its checkpoints, e.g. {given}.'

    folder = copied(first, tmp_path, plain=True)
    change_config(folder, base_model_name_or_path=None)
    assert llm_sft.main(['--dataset', str(data_file), '--adapter', str(folder)]) == 2
    assert any('does not say which base model it was trained on. Name the base model with' in p for p in problems())

    damaged = Path(shutil.copytree(given, tmp_path / 'damaged'))
    (damaged / ADAPTER).write_bytes((damaged / ADAPTER).read_bytes()[:-4])
    run_sft('--adapter', str(damaged), expect=2)
    assert f'--adapter {damaged} cannot be used: {ADAPTER} has ' in problems()[-1]


def test_an_adapter_of_2023_is_trained_on_the_native_layers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base, key = ROOT / 'tests' / 'goldens' / 'qwen-a', 'qwen-7b'
    model = load_model(base, model_type=key, torch_dtype=torch.float32)
    width = model.config.hidden_size
    module = 'base_model.model.transformer.h.{}.attn.c_attn'
    state = {}
    for n in range(len(model.model.layers)):
        state[f'{module.format(n)}.lora_A.weight'] = torch.randn((4, width), generator=generator)
        state[f'{module.format(n)}.lora_B.weight'] = torch.randn((3 * width, 4), generator=generator)
    torch.save(state, tmp_path / 'adapter_model.bin')
    config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 4, 'lora_alpha': 8, 'target_modules': ['c_attn']}
    (tmp_path / 'adapter_config.json').write_text(json.dumps(config))

    args = SftArguments(adapter=str(tmp_path), lora_rank=4, lora_alpha=8, lora_target_modules=['c_attn'])
    family = MODEL_MAPPING[key].family
    prepared = prepare_model(model, args, base=base, family=family)
    served = load_adapter(load_model(base, model_type=key, torch_dtype=torch.float32), tmp_path, base, family)
    trained = {name: p for name, p in prepared.named_parameters() if p.requires_grad}
    expected = dict(served.named_parameters())
    assert len(trained) == 3 * 2 * len(model.model.layers)
    assert all(torch.equal(p, expected[name]) for name, p in trained.items())


def test_a_frozen_tower_of_the_adapter_names_the_flag(tmp_path: Path) -> None:
    from tests.support.vision_models import QWEN25_VL, make_seeing_model, make_seeing_tokenizer
    from utils.base.errors import ConfigError

    def opened() -> Any:
        return make_seeing_model(QWEN25_VL, make_seeing_tokenizer(QWEN25_VL))

    prepare_model(opened(), SftArguments(lora_target_modules=['ALL'], freeze_vision=False)).save_pretrained(tmp_path)
    targets = json.loads((tmp_path / 'adapter_config.json').read_text())['target_modules']
    args = SftArguments(adapter=str(tmp_path), lora_target_modules=[t for t in targets if t in ('q_proj', 'v_proj')])
    with pytest.raises(ConfigError, match=r'the adapter is on layers of the vision tower. Add --freeze_vision false\.'):
        prepare_model(opened(), args)


@pytest.mark.slow
@pytest.mark.optional
def test_a_quantised_base_is_trained_on_and_merged(run_sft: Run) -> None:
    pytest.importorskip('bitsandbytes')
    flags = ('--quantization_bit', '4', '--max_steps', '3')
    run = run_sft(*flags)
    on = run_sft(*flags, '--adapter', str(run / 'checkpoint-3'), '--max_steps', '6')
    resumed = run_sft('--quantization_bit', '4', '--resume_from_checkpoint', str(on / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', on / 'checkpoint-6')
    first_loss = log_lines(run / 'checkpoint-3')[0]['loss']
    assert log_lines(on / 'checkpoint-3')[0]['loss'] < first_loss
    assert llm_infer.main(['--ckpt_dir', str(on / 'checkpoint-6'), '--merge_lora_and_save', 'true']) == 0
    assert json.loads((on / 'proofs.json').read_text())['merge']['passed']
