"""Registries, inference of model types from names, and the decisions of resolve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.cli.ranges import OPTIMIZERS, SCHEDULERS
from utils.cli.resolution import Resolution
from utils.cli.resolve import resolve_sft
from utils.cli.template_entry import entry_problems
from utils.model import MODEL_MAPPING, get_model_info, infer_model_type, load_model, load_tokenizer
from utils.preprocess import TEMPLATE_MAPPING, Template


def resolved(*words: str) -> Resolution[SftArguments]:
    return resolve_sft(parse(SftArguments, words, program='x', about='x'))


def test_entries_are_complete() -> None:
    assert len(MODEL_MAPPING) >= 149
    for key, info in MODEL_MAPPING.items():
        assert key == key.lower() and info.model_id_or_path.count('/') == 1
        assert info.hf_model_id is None or info.hf_model_id.count('/') == 1
        assert info.template in TEMPLATE_MAPPING and info.lora_target_modules
    assert len(TEMPLATE_MAPPING) >= 13


TEXT = ('{{QUERY}}\n',)
END = (('eos_token_id',),)
ENTRIES = [
    (Template(prefix=('{{SYSTM}}\n',), prompt=TEXT, chat_sep=(), suffix=END),
     ["prefix: {{SYSTM}} is unknown: did you mean '{{SYSTEM}}'? This field has {{SYSTEM}}."]),
    (Template(prefix=(), prompt=('{{ query }}',), chat_sep=None, suffix=END),
     ["prompt: {{ query }} is unknown: did you mean '{{QUERY}}'? This field has {{QUERY}} and {{ROUND}}."]),
    (Template(prefix=(), prompt=TEXT, chat_sep=('{{QUERY}}',), suffix=('{{SYSTEM}}', *END)),
     ['chat_sep: {{QUERY}} is unknown. This field has no placeholders.',
      'suffix: {{SYSTEM}} is unknown. This field has no placeholders.']),
    (Template(prefix=(), prompt=('Q: \nA: ',), chat_sep=(), suffix=()),
     ['prompt: it has no {{QUERY}}, so the model would see no question. Add {{QUERY}}.',
      "suffix: it is empty, so the model would not learn to end a reply. Write (('eos_token_id',),)."]),
    (Template(prefix=(1,), prompt='{{QUERY}}', chat_sep=(), suffix=((None,),)),  # type: ignore[arg-type]
     ['prefix: 1 is neither a text nor a tuple. Write (1,) for the token with this id.',
      "prompt: '{{QUERY}}' is no tuple. Write ('{{QUERY}}',), with the comma.",
      "suffix: (None,) has parts that are neither token ids nor names. Write e.g. ('eos_token_id',)."]),
]  # fmt: skip


@pytest.mark.parametrize(('template', 'faults'), ENTRIES)
def test_a_wrong_template_is_refused_before_it_drops_text(
    template: Template, faults: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEMPLATE_MAPPING, 'mine', template)
    done = resolved('--model_type', 'llama2-7b', '--dataset', 'sql-demo', '--template_type', 'mine')
    beginning = '--template_type mine: its entry in utils/preprocess.py, '
    assert done.problems.found == [beginning + fault for fault in faults]


def test_what_is_no_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATE_MAPPING, 'mine', (TEMPLATE_MAPPING['chatml'],))  # type: ignore[arg-type]
    done = resolved('--model_type', 'llama2-7b', '--dataset', 'sql-demo', '--template_type', 'mine')
    assert done.problems.found == [
        '--template_type mine: its entry in utils/preprocess.py is a tuple, not a Template. Remove a comma behind '
        'Template(...).'
    ]


def test_the_templates_here_have_no_mistakes() -> None:
    templates = {name: template for name, template in TEMPLATE_MAPPING.items() if template is not None}
    assert len(templates) >= 12
    assert not [problem for name, template in templates.items() for problem in entry_problems(name, template)]


def test_model_type_is_inferred_from_ids_and_folder_names() -> None:
    assert infer_model_type('modelscope/Llama-2-7b-ms') == 'llama2-7b'
    assert infer_model_type('meta-llama/Llama-2-13b-chat-hf') == 'llama2-13b-chat'
    assert infer_model_type('/models/Mistral-7B-v0.1') == 'mistral-7b'
    assert infer_model_type('/models/my-own') is None
    info = get_model_info('mistral-7b', '/models/Mistral-7B-v0.1')
    assert (info.model_id_or_path, info.template) == ('/models/Mistral-7B-v0.1', 'default')


def test_every_open_argument_is_filled_with_a_reason() -> None:
    done = resolved('--model_type', 'llama2-7b-chat', '--dataset', 'sql-demo', '--eval_steps', '7')
    args = done.args
    assert not done.problems.found
    assert (args.template_type, args.learning_rate, args.save_steps, args.only_save_model) == ('llama', 1e-4, 7, False)
    assert args.lora_target_modules == ['q_proj', 'k_proj', 'v_proj']
    assert 'learning_rate = 0.0001 because sft_type is lora' in done.decisions
    full = resolved('--model_type', 'llama2-7b', '--dataset', 'sql-demo', '--sft_type', 'full').args
    assert (full.learning_rate, full.only_save_model, full.template_type) == (2e-5, True, 'default')
    generating = resolved('--predict_with_generate', 'true', '--batch_size', '8').args
    assert generating.eval_batch_size == 1


def test_resolve_is_pure() -> None:
    parsed = parse(SftArguments, ['--model_type', 'llama2-7b', '--dataset', 'sql-demo'], program='x', about='x')
    before = json.dumps(parsed.args.__dict__)
    first, second = resolve_sft(parsed), resolve_sft(parsed)
    assert json.dumps(parsed.args.__dict__) == before
    assert first.args == second.args and first.decisions == second.decisions


def test_flags_are_parsed_as_documented() -> None:
    words = [
        '--tuner_bankend',
        'peft',
        '--dataset',
        'a.json,b.json',
        'c.json',
        '--do_sample',
        'False',
        '--max_steps=-1',
    ]
    parsed = parse(SftArguments, words, program='x', about='x')
    assert not parsed.problems.found
    assert parsed.args.tuner_backend == 'peft' and parsed.args.do_sample is False and parsed.args.max_steps == -1
    assert parsed.args.dataset == ['a.json', 'b.json', 'c.json']
    assert parsed.typed == {'tuner_backend', 'dataset', 'do_sample', 'max_steps'}


def test_data_sets_add_up_and_of_other_flags_the_last_counts() -> None:
    def args(*words: str, earlier: tuple[str, ...] = ()) -> SftArguments:
        parsed = parse(SftArguments, words, program='x', about='x', earlier=earlier)
        assert not parsed.problems.found
        return parsed.args

    twice = args('--dataset', 'a.json', '--seed', '1', '--dataset', 'b.json', 'c.json', '--seed', '2')
    assert (twice.dataset, twice.seed) == (['a.json', 'b.json', 'c.json'], 2)
    targets = ('--lora_target_modules', 'q_proj', '--lora_target_modules', 'k_proj')
    assert args(*targets).lora_target_modules == ['k_proj']
    script = args('--dataset', 'a.json', '--seed', '1', '--', '--dataset', 'b.json')
    assert (script.dataset, script.seed) == (['b.json'], 1), 'what follows -- replaces what a script says'
    assert args('--dataset', 'b.json', earlier=('--dataset', 'a.json')).dataset == ['b.json']
    assert args(earlier=('--dataset', 'a.json')).dataset == ['a.json']


def test_a_negative_number_with_an_exponent_is_a_value() -> None:
    for word in ('-1e-4', '-1.5E3', '-.5e+2'):
        parsed = parse(SftArguments, ['--learning_rate', word, '--seed', '3'], program='x', about='x')
        assert not parsed.problems.found
        assert (parsed.args.learning_rate, parsed.args.seed) == (float(word), 3)


def test_names_of_optimizers_and_schedules_are_those_of_the_library() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) <= {o.value for o in OptimizerNames} and len(OPTIMIZERS) == 21
    assert set(SCHEDULERS) <= {s.value for s in SchedulerType} and len(SCHEDULERS) == 8


def test_public_loaders_open_a_directory(model_dir: Path) -> None:
    import torch

    model, tokenizer = load_model(model_dir, torch_dtype=torch.float32), load_tokenizer(model_dir)
    assert model.dtype == torch.float32 and tokenizer.pad_token_id is not None


@pytest.mark.slow
def test_embedded_model_opens_without_network_and_names_the_hub_id(tmp_path: Path) -> None:
    from utils.loading.gguf import dense_directory, find_packaged_file
    from utils.loading.info import LoadOptions
    from utils.loading.opening import get_model_tokenizer
    from utils.loading.weights import locate

    info = MODEL_MAPPING['smollm2-135m-instruct']
    if find_packaged_file(*info.embedded) is None:
        pytest.skip('the package with the embedded model is not installed')
    import torch

    weights = locate(info, revision='master')
    assert weights.path.suffix == '.gguf' and weights.fingerprint.covers == 'whole'
    model, tokenizer = get_model_tokenizer(info, weights, LoadOptions(torch_dtype=torch.bfloat16))
    assert model.name_or_path == 'HuggingFaceTB/SmolLM2-135M-Instruct'
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(tokenizer.added_tokens_decoder) == 17
    assert tokenizer.tokenize('12 a3') == ['1', '2', 'Ġa', '3'], 'every digit is a token of its own'
    made = dense_directory(weights.path)
    assert dense_directory(weights.path) == made and not list(made.parent.glob('.aside-*'))

    # Template auto on the real tokenizer: ids of apply_chat_template, loss only on the reply and its end.
    from utils.encode.make import make_encoder
    from utils.formats.conversation import Row

    encoder = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=-1)
    compared = 0
    for turns in (1, 2, 3):
        for system in ([], [{'role': 'system', 'content': 'Be brief: 12 words.'}]):
            chat = [
                {'role': role, 'content': f'{role} says {n} things, e.g. {n * 7.5} 你好'}
                for n in range(turns)
                for role in ('user', 'assistant')
            ]
            messages = [*system, *chat]
            row = encoder.encode([Row(messages=messages)])[0]
            assert (
                row.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)['input_ids']
            )
            start, end = row.trained
            assert tokenizer.decode(row.input_ids[start:end]) == messages[-1]['content'] + '<|im_end|>'
            assert row.notes == []
            compared += 1
    assert compared == 6
