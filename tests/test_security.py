"""Code and pickles that lie in a checkpoint are never run, by any path that opens it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_model, make_tokenizer, small_flags

Problems = Callable[[], list[str]]


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def trap(folder: Path, mark: Path) -> None:
    """Plant modeling and tokenizer files that leave a mark, and an auto_map that asks for them."""
    for name in ('modeling_trap.py', 'tokenization_trap.py', 'configuration_trap.py', 'setup.py', 'sitecustomize.py'):
        (folder / name).write_text(f'import pathlib\npathlib.Path({str(mark)!r}).touch()\n')
    for name in ('config.json', 'tokenizer_config.json'):
        content = json.loads((folder / name).read_text())
        content['auto_map'] = {
            'AutoConfig': 'configuration_trap.Config',
            'AutoModelForCausalLM': 'modeling_trap.Model',
            'AutoTokenizer': ['tokenization_trap.Tokenizer', None],
        }
        (folder / name).write_text(json.dumps(content))


@pytest.fixture
def trapped(tmp_path: Path) -> tuple[Path, Path]:
    folder, mark = tmp_path / 'trapped', tmp_path / 'mark'
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    trap(folder, mark)
    return folder, mark


def test_code_of_a_checkpoint_is_not_run_and_not_passed_on(
    trapped: tuple[Path, Path], data_file: Path, tmp_path: Path
) -> None:
    import llm_infer
    import llm_sft

    folder, mark = trapped
    words = small_flags(folder, data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--max_steps', '1']) == 0
    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-1'))
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--do_sample', 'false', '--max_new_tokens', '2']) == 0
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    native = tmp_path / 'native'
    words = ['--model_id_or_path', str(folder), '--export_native', 'true', '--output_dir', str(native)]
    assert llm_infer.main(words) == 0
    assert not mark.exists()
    for made in (native, checkpoint.with_name('checkpoint-1-merged')):
        assert not list(made.glob('*.py'))
        for name in ('config.json', 'tokenizer_config.json'):
            assert 'auto_map' not in json.loads((made / name).read_text())


def test_pickles_in_a_checkpoint_are_not_run(
    trapped: tuple[Path, Path], data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    import llm_sft

    folder, mark = trapped
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({'model.norm.weight': Bomb(mark)}))
    assert llm_sft.main(small_flags(folder, data_file, tmp_path / 'out')) == 2
    assert 'holds more than tensors' in problems()[0] and 'weights_only' not in problems()[0]
    assert not mark.exists()


def test_pickles_in_an_original_layout_are_not_run(
    trapped: tuple[Path, Path], data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    import llm_sft

    folder, mark = trapped
    (folder / 'model.safetensors').unlink()
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'model_type': 'internlm', 'bias': False}))
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({'model.norm.weight': Bomb(mark)}))
    assert llm_sft.main(small_flags(folder, data_file, tmp_path / 'out')) == 2
    assert 'cannot be read as a tensor archive' in problems()[0]
    assert not mark.exists()
