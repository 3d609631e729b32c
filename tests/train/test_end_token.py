"""The check whether the base model ever learned the token that ends a reply."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llm_sft
from tests.support.runs import small_flags
from tests.support.tiny_models import make_model, make_tokenizer
from utils.train.end_token import untrained_ids, warn_of_untrained_ends

END = 4
UNUSED = [f'<unused{n}>' for n in range(20)]


def base(kind: str, *, learnt: bool, tied: bool = False) -> tuple[torch.nn.Linear, object]:
    """Return the head and the tokenizer of a base with unused tokens; its end of turn is learned or not."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(UNUSED)
    head = torch.nn.Linear(32, len(tokenizer), bias=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.weight)
    common = torch.randn(32)
    blank = [END] * (not learnt) + tokenizer.convert_tokens_to_ids(UNUSED)
    for token in blank:
        noise = torch.randn(32)
        rows = {'alike': common + 0.25 * noise, 'zero': 1e-9 * noise, 'random': noise}
        head.weight.data[token] = rows[kind]
    return head, tokenizer


@pytest.mark.parametrize('kind', ['alike', 'zero'])
@pytest.mark.parametrize('learnt', [False, True])
def test_an_end_like_unused_tokens_is_found(kind: str, learnt: bool) -> None:
    head, tokenizer = base(kind, learnt=learnt)
    assert untrained_ids(head, tokenizer, [2, END]) == ([] if learnt else [END])


def test_nothing_is_said_where_unused_tokens_are_not_told_from_words() -> None:
    head, tokenizer = base('random', learnt=False)
    assert untrained_ids(head, tokenizer, [2, END]) == []


def test_a_new_token_is_not_checked_because_its_row_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    head, tokenizer = base('alike', learnt=False)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    warn_of_untrained_ends(model, tokenizer, [END], trained=[END])
    assert not caplog.records
    warn_of_untrained_ends(model, tokenizer, [END])
    assert len(caplog.records) == 1 and 'e.g. default.' in caplog.text
    caplog.clear()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(END)
    warn_of_untrained_ends(model, tokenizer, [])
    assert '--sft_type full' in caplog.text and '--template_type whose' not in caplog.text


def test_rows_beyond_the_tokenizer_are_unused() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=False)
    head.weight.data[400:] = head.weight.data[END]
    assert untrained_ids(head, make_tokenizer(), [2, END]) == [END]


@pytest.mark.slow
@pytest.mark.parametrize(('flags', 'warned'), [((), 1), (('--sft_type', 'full'), 0)])
def test_a_lora_run_warns_with_the_remedy(
    flags: tuple[str, ...], warned: int, data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = make_model(vocab_size=440), make_tokenizer()
    model.lm_head.weight.data[len(tokenizer) :] = model.lm_head.weight.data[END]
    model.save_pretrained(tmp_path / 'base')
    tokenizer.save_pretrained(tmp_path / 'base')
    words = small_flags(tmp_path / 'base', data_file, tmp_path / 'out')
    assert llm_sft.main([*words, '--max_steps', '1', *flags]) == 0
    said = [r.getMessage() for r in caplog.records if 'The base model never learnt' in r.getMessage()]
    assert len(said) == warned
    assert all("'<|im_end|>'" in line and '--sft_type full' in line for line in said)
