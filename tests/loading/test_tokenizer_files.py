"""Tokenizers in model folders: larger than the embedding, or different from what their class makes of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import llm_infer
import llm_sft
from tests.support.runs import small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.cli.arguments import InferArguments
from utils.encode.make import make_encoder
from utils.infer.generation import generate_batch, generation_config
from utils.model import load_tokenizer

Problems = Callable[[], list[str]]
LARGE = '<image_soft_token>'


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """Return a model whose tokenizer has one token more than the embedding, as in Gemma 3's text models."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([LARGE])
    folder = tmp_path / 'larger'
    make_model(vocab_size=len(tokenizer) - 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_embedding_trains_and_answers(
    larger: Path, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert llm_sft.main([*small_flags(larger, data_file, tmp_path / 'out'), '--max_steps', '1']) == 0
    warned = [r.getMessage() for r in caplog.records if 'the model has only' in r.getMessage()]
    assert len(warned) == 1 and repr(LARGE) in warned[0]
    checkpoint = next((tmp_path / 'out').glob('*/*/checkpoint-1'))
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--max_new_tokens', '2']) == 0


def test_a_row_with_a_token_that_is_not_embedded_is_named(larger: Path, tmp_path: Path, problems: Problems) -> None:
    rows: list[Any] = [{'query': f'count {i}', 'response': 'yes'} for i in range(9)]
    data = write_jsonl(tmp_path / 'a.jsonl', [*rows, {'query': f'see {LARGE}', 'response': 'no'}])
    words = [*small_flags(larger, data, tmp_path / 'out'), '--dataset_test_ratio', '0.5', '--max_steps', '1']
    assert llm_sft.main(words) == 2
    assert [line.startswith(f"{data}:10: the token '{LARGE}' has the id 400, ") for line in problems()] == [True]


@pytest.mark.slow
def test_encoded_rows_of_a_cache_are_refused_as_others_are(larger: Path, tmp_path: Path, problems: Problems) -> None:
    rows: list[Any] = [{'query': f'count {i}', 'response': 'yes'} for i in range(9)]
    data = write_jsonl(tmp_path / 'a.jsonl', [*rows, {'query': f'see {LARGE}', 'response': 'no'}])
    words = [*small_flags(larger, data, tmp_path / 'out'), '--max_steps', '1']
    assert llm_sft.main([*words, '--dry_run', 'true']) == 0
    assert llm_sft.main(words) == 2
    assert [f'{data}:10: the token ' in line for line in problems()] == [True]


@pytest.mark.parametrize('number', [3, 290])  # the first 256 rows are checked before training
def test_a_streamed_row_with_a_token_that_is_not_embedded_is_named(
    number: int, larger: Path, tmp_path: Path, problems: Problems
) -> None:
    rows: list[Any] = [{'query': f'count {i}', 'response': 'yes'} for i in range(300)]
    rows[number - 1] = {'query': 'see', 'response': f'no {LARGE}'}
    data = write_jsonl(tmp_path / 'a.jsonl', rows)
    words = [*small_flags(larger, data, tmp_path / 'out'), '--streaming', 'true', '--stream_val_rows', '2']
    words += ['--dataset_test_ratio', '0', '--max_steps', '20', '--eval_steps', '30', '--batch_size', '16']
    assert llm_sft.main(words) == 2
    named = [line for line in problems() if 'the token ' in line]
    assert len(named) == 1 and named[0].startswith(f"{data}:{number}: the token '{LARGE}' has the id 400, ")


@pytest.mark.slow
def test_a_row_to_answer_with_a_token_that_is_not_embedded_is_named(
    larger: Path, data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    data = write_jsonl(tmp_path / 'a.jsonl', [{'query': f'see {LARGE}', 'response': 'no'}])
    words = ['--model_id_or_path', str(larger), '--template_type', 'auto', '--dataset', str(data)]
    assert llm_infer.main([*words, '--result_path', str(tmp_path / 'r.jsonl'), '--dtype', 'fp32']) == 2
    assert [line.startswith(f"{data}:1: the token '{LARGE}' has the id 400, ") for line in problems()] == [True]


def ends_in(end: str, call_end: str) -> Any:
    """Return a tokenizer with one token too many, and a template with these ends of replies and calls."""
    source = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{%- for c in m.tool_calls or [] %}{{ 'CALL ' + c.function.name }}{% endfor %}"
        f"{{{{ '{call_end}' if m.tool_calls else '{end}' }}}}{{% endfor %}}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=source)
    tokenizer.add_tokens([LARGE])
    return tokenizer


def encoder_of(tokenizer: Any) -> Any:
    return make_encoder(
        tokenizer, template_type='auto', system='', system_typed=False, max_length=-1, embedding=len(tokenizer) - 1
    )


def test_a_template_whose_replies_end_beyond_the_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"template 'auto': replies end with '{LARGE}' \(id 400\), but the model"):
        encoder_of(ends_in(LARGE, LARGE))


def test_an_end_of_calls_beyond_the_embedding_stops_no_answer_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ends_in('<|im_end|>', LARGE)
    assert encoder_of(tokenizer).stop_ids == [tokenizer.convert_tokens_to_ids('<|im_end|>')]
    assert (
        f"a turn can end with '{LARGE}' (id 400), but the model's embedding has rows only for ids below 400"
        in caplog.text
    )
    whole = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=-1)
    assert set(whole.stop_ids) == set(tokenizer.convert_tokens_to_ids(['<|im_end|>', LARGE]))


def test_a_run_whose_template_ends_beyond_the_embedding_is_one_message(
    data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    tokenizer = ends_in(LARGE, LARGE)
    make_model(vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path / 'base')
    tokenizer.save_pretrained(tmp_path / 'base')
    assert llm_sft.main(small_flags(tmp_path / 'base', data_file, tmp_path / 'out')) == 2
    assert [line.startswith("template 'auto': replies end with") for line in problems()] == [True]


@pytest.mark.slow
def test_a_prompt_with_a_token_that_is_not_embedded_is_refused() -> None:
    config = generation_config(InferArguments(do_sample=False, max_new_tokens=2), make_tokenizer(), [])
    with pytest.raises(ConfigError, match='a prompt: it contains the token id 400, but .* only 400 embeddings'):
        generate_batch(make_model().eval(), [[7], [8, 400]], config)


def test_an_end_that_is_not_embedded_is_refused(
    larger: Path, data_file: Path, tmp_path: Path, problems: Problems
) -> None:
    file = larger / 'tokenizer_config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'eos_token': LARGE}))
    assert llm_sft.main(small_flags(larger, data_file, tmp_path / 'out')) == 2
    assert 'they do not belong together' in problems()[0]


TEXTS = ['    return x', '\n    a\n\n\tb ', 'a\n    b', ' a  b ', '你好 world 42']


def llama_folder(folder: Path) -> Any:
    """Write a tokenizer that the class named in its config would change. Returns it as the file defines it."""
    tokenizer = make_tokenizer(metaspace='first')
    tokenizer.save_pretrained(folder)
    file = folder / 'tokenizer_config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'tokenizer_class': 'LlamaTokenizer'}))
    return tokenizer


def test_a_tokenizer_file_is_used_where_its_class_gives_other_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = llama_folder(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    ids = [wanted(text)['input_ids'] for text in TEXTS]
    assert ids != [plain(text, add_special_tokens=False)['input_ids'] for text in TEXTS], 'it shows nothing else'
    with caplog.at_level(logging.INFO):
        found = load_tokenizer(tmp_path)
    assert [found(text)['input_ids'] for text in TEXTS] == ids
    assert found.chat_template == wanted.chat_template
    assert found.special_tokens_map == wanted.special_tokens_map
    said = [r.getMessage() for r in caplog.records if 'because LlamaTokenizer would encode' in r.getMessage()]
    assert len(said) == 1
    found.save_pretrained(tmp_path / 'again')
    assert [AutoTokenizer.from_pretrained(tmp_path / 'again')(text)['input_ids'] for text in TEXTS] == ids


def test_a_class_that_keeps_to_the_file_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        assert type(load_tokenizer(tmp_path)) is PreTrainedTokenizerFast
    assert 'the tokenizer is opened as' not in caplog.text
