"""Code and pickles in a checkpoint are never executed, on any path that opens it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.old_models import original_folder
from tests.support.runs import small_flags
from tests.support.tiny_models import make_model, make_tokenizer
from utils.cli.arguments import InferArguments, SftArguments, flag_types
from utils.cli.parser import parse
from utils.model import load_model, load_tokenizer
from utils.run.record import RunRecord, Trained, fill_from_run

Problems = Callable[[], list[str]]


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def code(mark: Path) -> str:
    return f'import pathlib\npathlib.Path({str(mark)!r}).touch()\n'


def trap(folder: Path, mark: Path) -> None:
    """Plant code files that leave a mark, configurations that refer to them, and a chat template that tries to."""
    names = [f'{kind}_trap.py' for kind in ('modeling', 'tokenization', 'configuration', 'processing')]
    # Also under the names of the original files, and of files that Python itself looks for.
    names += ['modeling_qwen.py', 'tokenization_qwen.py', 'configuration_qwen.py', 'qwen_generation_utils.py']
    names += ['setup.py', 'conftest.py', 'sitecustomize.py', '__init__.py', 'custom_generate/generate.py']
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code(mark))
    for name in ('config.json', 'tokenizer_config.json', 'generation_config.json'):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        content['auto_map'] = {
            'AutoConfig': 'configuration_trap.Config',
            'AutoModelForCausalLM': 'modeling_trap.Model',
            'AutoTokenizer': ['tokenization_trap.Tokenizer', None],
            'AutoProcessor': 'processing_trap.Processor',
        }
        file.write_text(json.dumps({**content, 'custom_generate': str(folder)} if 'generation' in name else content))


@pytest.fixture(params=['native', 'original'])
def trapped(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Return a folder with traps, in a native or an original layout, and the mark that the traps would leave."""
    mark = tmp_path / 'mark'
    if request.param == 'original':
        folder = original_folder('qwen-7b', tmp_path)
    else:
        folder = tmp_path / 'trapped'
        make_model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    trap(folder, mark)
    return folder, mark


def test_the_traps_would_leave_a_mark(tmp_path: Path) -> None:
    """Trigger each trap on purpose. This proves that an absent mark in the tests below means something."""
    for number, setting_off in enumerate((
        lambda mark: exec(code(mark)),
        lambda mark: pickle.loads(pickle.dumps(Bomb(mark))),
    )):  # fmt: skip
        mark = tmp_path / f'mark{number}'
        setting_off(mark)
        assert mark.exists()


@pytest.mark.slow
def test_code_of_a_checkpoint_is_not_run_and_not_passed_on(
    trapped: tuple[Path, Path], data_file: Path, tmp_path: Path
) -> None:
    folder, mark = trapped
    assert load_model(folder).training is False
    assert load_tokenizer(folder).eos_token_id is not None
    words = small_flags(folder, data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--max_steps', '1', '--template_type', 'default']) == 0
    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-1'))
    # A checkpoint can also come from a stranger.
    trap(checkpoint, mark)
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--do_sample', 'false', '--max_new_tokens', '2']) == 0
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    resumed = ['--max_steps', '2', '--template_type', 'default', '--resume_from_checkpoint', str(checkpoint)]
    assert llm_sft.main([*words, *resumed]) == 2, 'its files are not those that were written'
    native = tmp_path / 'native'
    words = ['--model_id_or_path', str(folder), '--export_native', 'true', '--output_dir', str(native)]
    assert llm_infer.main(words) == 0
    assert not mark.exists()
    for made in (native, checkpoint.with_name('checkpoint-1-merged')):
        assert not list(made.rglob('*.py'))
        for name in ('config.json', 'tokenizer_config.json', 'generation_config.json'):
            assert not {'auto_map', 'custom_generate'} & set(json.loads((made / name).read_text()))


def test_a_chat_template_cannot_reach_the_system(tmp_path: Path, data_file: Path, problems: Problems) -> None:
    folder, mark = tmp_path / 'trapped', tmp_path / 'mark'
    make_model().save_pretrained(folder)
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}{{ messages[0]['content'] }}"
    make_tokenizer(chat_template=template).save_pretrained(folder)
    assert llm_sft.main(small_flags(folder, data_file, tmp_path / 'out')) == 2
    assert len(problems()) == 1 and 'unsafe' in problems()[0]
    assert not mark.exists()


@pytest.mark.slow
def test_pickles_in_a_checkpoint_are_not_run(
    trapped: tuple[Path, Path], data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    folder, mark = trapped
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({'model.norm.weight': Bomb(mark)}))
    words = small_flags(folder, data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--template_type', 'default']) == 2
    words = ['--model_id_or_path', str(folder), '--export_native', 'true', '--output_dir', str(tmp_path / 'native')]
    assert llm_infer.main(words) == 2
    assert len(problems()) == 2
    for problem in problems():
        assert 'holds more than tensors' in problem and 'weights_only' not in problem
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize('targets', [['q_proj'], ['c_attn']])
def test_pickles_in_an_adapter_are_not_run(
    targets: list[str], data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    """PEFT reads a native adapter; this project reads one of a fused layout."""
    folder, mark = original_folder('qwen-7b', tmp_path), tmp_path / 'mark'
    words = [*small_flags(folder, data_file, tmp_path / 'out'), '--max_steps', '1', '--template_type', 'default']
    assert llm_sft.main(words) == 0
    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-1'))
    (checkpoint / 'adapter_model.safetensors').unlink()
    config = json.loads((checkpoint / 'adapter_config.json').read_text())
    (checkpoint / 'adapter_config.json').write_text(json.dumps({**config, 'target_modules': targets}))
    for content in (pickle.dumps({'lora_A': Bomb(mark)}), zipped_pickle(Bomb(mark))):
        (checkpoint / 'adapter_model.bin').write_bytes(content)
        for flags in (['--do_sample', 'false', '--max_new_tokens', '2'], ['--merge_lora_and_save', 'true']):
            assert llm_infer.main(['--ckpt_dir', str(checkpoint), *flags]) == 2
        assert llm_sft.main([*words, '--max_steps', '2', '--resume_from_checkpoint', str(checkpoint)]) == 2
    assert len(problems()) == 6
    assert not mark.exists()


def zipped_pickle(content: Any) -> bytes:
    """Return an archive as torch.save writes it, with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('archive/data.pkl', pickle.dumps(content))
        archive.writestr('archive/byteorder', 'little')
        archive.writestr('archive/version', '3\n')
    return file.getvalue()


@pytest.mark.slow
def test_pickles_in_what_a_run_resumes_from_are_not_run(
    model_dir: Path, data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    mark = tmp_path / 'mark'
    words = small_flags(model_dir, data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--max_steps', '1']) == 0
    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-1'))
    planted = 0
    for name in ('optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'training_args.bin'):
        kept = (checkpoint / name).read_bytes() if (checkpoint / name).is_file() else None
        for content in (pickle.dumps(Bomb(mark)), zipped_pickle(Bomb(mark))):
            (checkpoint / name).write_bytes(content)
            # Refused if the file is read; ignored if it is not.
            assert llm_sft.main([*words, '--max_steps', '2', '--resume_from_checkpoint', str(checkpoint)]) in (0, 2)
            assert not mark.exists(), name
            planted += 1
        (checkpoint / name).unlink() if kept is None else (checkpoint / name).write_bytes(kept)
    assert planted == 8


OF_ANSWERS = sorted(flag_types(InferArguments).keys() - flag_types(SftArguments).keys())


@pytest.mark.parametrize('name', OF_ANSWERS)
def test_a_checkpoint_sets_no_flag_that_only_answering_has(name: str, tmp_path: Path) -> None:
    """Such flags run a converter, name a server that gets rows and a key, or name a file that is written."""
    (tmp_path / 'adapter_config.json').write_text('{}')
    asked = parse(InferArguments, ['--ckpt_dir', str(tmp_path)], program='llm_infer.py', about='')
    before = getattr(asked.args, name)
    record = RunRecord(flags={'model_type': 'llama2-7b', name: 'planted', 'seed': 7})
    warnings: list[str] = []
    filled = fill_from_run(asked, Trained(checkpoint=tmp_path, record=record), warnings)
    assert getattr(filled.args, name) == before
    assert filled.args.seed == 7 and len(OF_ANSWERS) >= 14
    assert [w for w in warnings if f'sft_args.json has --{name}, which no training run writes: not used.' in w]
