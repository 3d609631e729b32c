"""The spellings of --lora_target_modules: names, all-linear, and regular expressions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.modern_models import make_modern
from tests.support.runs import assert_equal, small_flags, weights
from tests.support.tiny_models import make_model
from tests.support.vision_models import QWEN25_VL, make_seeing_model, make_seeing_tokenizer
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.estimate.gpus import Machine, mode_of
from utils.estimate.memory import lora_parameters
from utils.estimate.model_shape import known_shape, measure
from utils.model import get_model_info
from utils.train.prepare import find_targets, prepare_model, say_what_all_adds

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
FIRST_LAYER = r're:.*\.layers\.0\..*\.(q|v)_proj'
FIRST_PATHS = ['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.v_proj']


def test_a_pattern_matches_whole_paths() -> None:
    model = make_model()
    assert find_targets(model, [FIRST_LAYER]) == (FIRST_PATHS, [])
    assert find_targets(model, [r're:.*_proj'])[0] == find_targets(model, ['all-linear'])[0]
    assert find_targets(model, [r're:.*self_attn\.[qk]_proj', FIRST_LAYER, 'down_proj'])[0] == [
        'k_proj', 'q_proj', *FIRST_PATHS, 'down_proj',
    ]  # fmt: skip
    assert find_targets(model, ['0.self_attn.q_proj']) == (['0.self_attn.q_proj'], []), 'the end of a path is a name'
    for pattern in ('re:q_proj', r're:.*lm_head', r're:.*\.q_pro'):
        with pytest.raises(ConfigError, match='matches the whole path of no linear layer of LlamaForCausalLM'):
            find_targets(model, [pattern])
    with pytest.raises(
        ConfigError, match=r"did you mean 'q_proj' or .*Its paths are like model.layers.0.self_attn.q_proj"
    ):
        find_targets(model, ['re:q_prj'])


def test_only_the_layers_of_a_pattern_are_adapted() -> None:
    model = make_model()
    prepared = prepare_model(model, SftArguments(lora_target_modules=[FIRST_LAYER]))
    adapted = {name.split('.lora_')[0] for name, p in prepared.named_parameters() if p.requires_grad}
    assert adapted == {f'base_model.model.{path}' for path in FIRST_PATHS}


def test_a_comma_belongs_to_a_pattern_and_separates_names() -> None:
    words = ['--lora_target_modules', 're:.{1,20}q_proj', 'k_proj,v_proj']
    args = parse(SftArguments, words, program='x', about='').args
    assert args.lora_target_modules == ['re:.{1,20}q_proj', 'k_proj', 'v_proj']


def test_a_pattern_of_names_that_peft_puts_on_experts_skips_them(caplog: pytest.LogCaptureFixture) -> None:
    model = make_modern('qwen3-next-80b-a3b-instruct')
    modules, experts = find_targets(model, [r're:.*(q|gate)_proj'])
    assert (modules, experts) == (['q_proj'], [])
    assert 'puts no LoRA on the linear layers down_proj, gate_proj, up_proj' in caplog.text


def test_a_pattern_for_a_frozen_tower_names_the_flag() -> None:
    model = make_seeing_model(QWEN25_VL, make_seeing_tokenizer(QWEN25_VL))
    with pytest.raises(ConfigError, match=r'add --freeze_vision false\.'):
        find_targets(model, [r're:.*visual.*'], ['model.visual'])


@pytest.mark.parametrize('words', [[FIRST_LAYER], [r're:.*self_attn\..*', 'down_proj'], ['all-linear']])
def test_the_estimate_counts_the_layers_of_a_pattern(words: list[str]) -> None:
    model = make_model()
    shape = measure(model)
    args = SftArguments(lora_target_modules=words, lora_rank=3)
    mode = mode_of(args, get_model_info(None, 'any'), shape, Machine())
    prepared = prepare_model(model, args)
    trained = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    assert lora_parameters(shape, mode.targets, 3) == trained


def test_the_table_knows_the_paths_of_a_model_that_is_not_here() -> None:
    shape = known_shape('qwen-7b-chat')
    assert shape is not None and len(shape.paths) == 7 * 32
    args = SftArguments(lora_target_modules=[r're:.*\.(3|31)\.mlp\..*'])
    mode = mode_of(args, get_model_info('qwen-7b-chat'), shape, Machine())
    assert lora_parameters(shape, mode.targets, 8) == 8 * 2 * 3 * (4096 + 11008)
    with pytest.raises(ConfigError, match="'re:nothing' matches the whole path of no linear layer of Qwen2ForCausalLM"):
        mode_of(SftArguments(lora_target_modules=['re:nothing']), get_model_info('qwen-7b-chat'), shape, Machine())
    with pytest.raises(ConfigError, match="'q_prj' matches no linear layer of Qwen2ForCausalLM: did you mean 'q_proj'"):
        mode_of(SftArguments(lora_target_modules=['q_prj']), get_model_info('qwen-7b-chat'), shape, Machine())


@pytest.mark.parametrize(
    ('word', 'message'),
    [
        (
            're:(',
            "--lora_target_modules 're:(' is not a regular expression of Python: missing ), unterminated subpattern",
        ),
        ('re:', "--lora_target_modules 're:' has no pattern. Write for example "),
    ],
)
def test_a_bad_pattern_is_refused_with_the_arguments(
    word: str, message: str, run_sft: Run, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('utils.cli.machine.settle_sft', lambda done: done.checked())
    run_sft('--lora_target_modules', word, '--lora_rank', '0', expect=2)
    assert len(problems()) == 2 and problems()[1].startswith(message)


@pytest.mark.slow
def test_a_run_with_a_pattern_resumes_repeats_and_merges(run_sft: Run) -> None:
    flags = ('--lora_target_modules', FIRST_LAYER, 'o_proj')
    whole = run_sft(*flags)
    stored = json.loads((whole / 'checkpoint-6' / 'adapter_config.json').read_text())
    assert sorted(stored['target_modules']) == [*FIRST_PATHS, 'o_proj']
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    before = set(whole.parent.iterdir())
    assert llm_sft.main(['--from_run', str(whole)]) == 0
    (repeated,) = set(whole.parent.iterdir()) - before
    assert_equal(repeated / 'checkpoint-6', whole / 'checkpoint-6')
    assert llm_infer.main(['--ckpt_dir', str(whole / 'checkpoint-6'), '--merge_lora_and_save', 'true']) == 0
    assert json.loads((whole / 'proofs.json').read_text())['merge']['passed']
    assert len(weights(whole, 6)) == 2 * (2 + 2), 'A and B of two layers by pattern and two by name'


def test_what_all_linear_adds_is_counted_on_the_model() -> None:
    args = SftArguments(lora_target_modules=['q_proj', 'k_proj', 'v_proj'])
    trained = 8 * 2 * ((32 + 32) + 2 * (32 + 16))
    rest = 8 * 2 * ((32 + 32) + 3 * (32 + 64))
    assert say_what_all_adds(make_model(), args) == (
        f'lora_target_modules all-linear would add 8 linear layers: {trained + rest:,} trainable parameters instead of '
        f'{trained:,}'
    )
    assert say_what_all_adds(make_model(), SftArguments(lora_target_modules=['all-linear'])) is None
    assert say_what_all_adds(make_model(), SftArguments(sft_type='full')) is None


@pytest.mark.slow
def test_an_entry_of_2023_keeps_its_targets_and_says_what_all_linear_would_add(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / 'Llama-2-7b-hf')
    words = small_flags(Path(folder), data_file, tmp_path / 'output')
    for typed in ((), ('--lora_target_modules', 'q_proj', 'k_proj', 'v_proj')):
        assert llm_sft.main([*words, '--max_steps', '1', *typed]) == 0
        run = sorted((tmp_path / 'output' / 'llama2-7b').iterdir())[-1]
        stored: dict[str, Any] = json.loads((run / 'checkpoint-1' / 'adapter_config.json').read_text())
        assert sorted(stored['target_modules']) == ['k_proj', 'q_proj', 'v_proj']
        decisions = json.loads((run / 'run.json').read_text())['decisions']
        lines = [line for line in decisions if line.startswith('lora_target_modules all-linear would add 8 linear')]
        assert len(lines) == (0 if typed else 1)
