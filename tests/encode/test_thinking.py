"""The thinking switch of templates whose generation prompt closes the think block: inference asks as in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llm_infer
from tests.support.runs import write_jsonl
from tests.support.templates import SWITCHED
from tests.support.tiny_models import make_model, make_tokenizer
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.export.model_card import model_card
from utils.formats.conversation import Row
from utils.infer import answers
from utils.infer.chat import Chat
from utils.proofs.template import ask_as_trained
from utils.run.record import RunRecord

SftRun = Callable[..., Path]
OPENED, CLOSED = '<|im_start|>assistant\n<think>\n', '<|im_start|>assistant\n<think>\n</think>\n\n'
SWITCH = 'enable_thinking=True'


@pytest.fixture
def switched_dir(tmp_path: Path) -> Path:
    """Return a model whose template closes the think block unless a variable opens it."""
    folder = tmp_path / 'switched'
    tokenizer = make_tokenizer(chat_template=SWITCHED)
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(reasoning: int, plain: int) -> list[dict[str, Any]]:
    """Return rows with reasoning, followed by rows without."""
    rows = []
    for number in range(reasoning + plain):
        reply = {'role': 'assistant', 'content': f'yes {number}'}
        reply |= {'reasoning_content': f'count {number}'} if number < reasoning else {}
        rows.append({'messages': [{'role': 'user', 'content': f'is it {number}?'}, reply]})
    return rows


def encoder() -> Encoder:
    return make_encoder(
        make_tokenizer(chat_template=SWITCHED), template_type='auto', system='', system_typed=False, max_length=-1
    )


def row(content: str, **reply: Any) -> Row:
    return Row(
        messages=[{'role': 'user', 'content': 'is it 1?'}, {'role': 'assistant', 'content': content, **reply}],  # type: ignore[typeddict-item]
        origin='test:1',
    )


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / 'sft_args.json').read_text())
    checkpoint = next(run.glob('checkpoint-*'))
    kept = json.loads((checkpoint / 'sft_args.json').read_text())
    assert [kept.get(key) for key in ('thinking', 'thinking_rows')] == [
        record.get(key) for key in ('thinking', 'thinking_rows')
    ]
    return record


@pytest.fixture
def train(run_sft: SftRun, switched_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains one step on rows with and without reasoning and returns the run folder."""

    def run(reasoning: int, plain: int, *flags: str) -> Path:
        data = write_jsonl(tmp_path / 'rows.jsonl', rows_of(reasoning, plain))
        words = (
            '--model_id_or_path',
            str(switched_dir),
            '--dataset',
            str(data),
            '--max_steps',
            '1',
            '--eval_steps',
            '1',
        )
        return run_sft(*words, *flags)

    return run


def asked_of(run: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[str]:
    """Return the prompts that llm_infer.py sends to the run's checkpoint, as text: in a chat, or for rows."""
    tokenizer = make_tokenizer(chat_template=SWITCHED)
    asked: list[str] = []

    def stream(model: Any, _: Any, prompt: list[int], *rest: Any, **options: Any) -> str:
        asked.append(tokenizer.decode(prompt))
        return 'yes'

    def batch(model: Any, prompts: Sequence[list[int]], *rest: Any, **options: Any) -> list[list[int]]:
        asked.extend(map(tokenizer.decode, prompts))
        return [[7] for _ in prompts]

    monkeypatch.setattr('utils.infer.chat.generate_stream', stream)
    monkeypatch.setattr(answers, 'generate_rows', batch)
    lines = iter(['is it 1?'])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr('builtins.input', typed)
    checkpoint = next(run.glob('checkpoint-*'))
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *flags]) == 0
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ('reasoning', 'plain', 'switch', 'prompt'),
    [(9, 0, SWITCH, OPENED), (9, 3, SWITCH, OPENED), (3, 9, None, CLOSED)],
)
def test_a_chat_asks_as_most_rows_were_trained(
    reasoning: int, plain: int, switch: str | None, prompt: str, train: SftRun, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = train(reasoning, plain)
    record = record_of(run)
    assert record['thinking'] == switch
    assert record['thinking_rows'] == {'switched': reasoning, 'of': reasoning + plain}
    reason = f'{reasoning} of {reasoning + plain} checked rows have a reply with reasoning, rendered with {SWITCH}'
    assert f'thinking = {switch} because {reason}' in caplog.text
    caplog.clear()
    asked = asked_of(run, monkeypatch, '--eval_human', 'true')
    assert [text[text.index('<|im_start|>assistant') :] for text in asked] == [prompt]
    assert (f'thinking = {SWITCH} because the run was trained with it: {reason}' in caplog.text) is (switch is not None)


@pytest.mark.slow
def test_the_prompt_of_a_chat_begins_what_was_trained(train: SftRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(9, 0)
    trained = encoder().encode([row('yes 1', reasoning='count 1')])[0]
    chatted = asked_of(run, monkeypatch, '--eval_human', 'true')[0]
    assert chatted == encoder().tokenizer.decode(trained.input_ids[: trained.prompt_length])
    answered = asked_of(run, monkeypatch)
    assert answered and all(text.endswith(OPENED) for text in answered)


@pytest.mark.slow
def test_data_without_reasoning_changes_nothing(train: SftRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(0, 12)
    assert not record_of(run).keys() & {'thinking', 'thinking_rows'}
    assert 'thinking' not in record_of(run).get('asked', {})
    assert asked_of(run, monkeypatch, '--eval_human', 'true')[0].endswith(CLOSED)
    assert all(text.endswith(CLOSED) for text in asked_of(run, monkeypatch))


@pytest.mark.slow
def test_a_labelled_row_decides_by_its_own_reasoning(
    train: SftRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(9, 3)
    test = write_jsonl(tmp_path / 'test.jsonl', rows_of(1, 1))
    asked = asked_of(run, monkeypatch, '--dataset', str(test))
    assert sorted(text[text.index('<|im_start|>assistant') :] for text in asked) == sorted([OPENED, CLOSED])


@pytest.mark.slow
def test_a_stream_decides_by_its_first_rows(train: SftRun) -> None:
    record = record_of(train(9, 2, '--streaming', 'true', '--stream_val_rows', '1', '--dataset_test_ratio', '0'))
    assert record['thinking'] == SWITCH and record['thinking_rows'] == {'switched': 8, 'of': 10}


def test_every_turn_of_a_chat_is_asked_with_the_switch() -> None:
    coder = encoder()
    ask_as_trained(coder, RunRecord(thinking=SWITCH, thinking_rows={'switched': 2, 'of': 2}))
    asked: list[str] = []

    def answer(prompt: list[int], images: Sequence[str]) -> str:
        asked.append(coder.tokenizer.decode(prompt))
        return 'yes'

    chat = Chat(coder, answer, lambda text: None)
    assert chat.handle('a') and chat.handle('b')
    assert all(text.endswith(OPENED) for text in asked) and '\nyes<|im_end|>' in asked[1]
    trained = coder.encode([row('yes'), row('yes', reasoning='why')])
    prompts = coder.encode_prompts([row('yes'), row('yes', reasoning='why')])
    assert [ids.input_ids[: ids.prompt_length] for ids in trained] == prompts, 'what is known decides itself'


@pytest.mark.parametrize('record', [{}, {'thinking': None}, {'thinking': 'thinking=True', 'thinking_rows': {}}])
def test_a_run_that_did_not_train_so_is_asked_plainly(record: dict[str, Any]) -> None:
    coder = encoder()
    ask_as_trained(coder, RunRecord.from_json(record))
    assert not coder.asks_to_think


@pytest.mark.slow
def test_the_merged_folder_and_the_card_say_how_to_ask(
    train: SftRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(9, 0)
    checkpoint = next(run.glob('checkpoint-*'))
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    assert f'ask it with {SWITCH} (chat_template_kwargs)' in caplog.text
    merged = run / f'{checkpoint.name}-merged'
    assert json.loads((merged / 'sft_args.json').read_text())['thinking'] == SWITCH
    card = model_card('a/b', RunRecord.read(run), {'step': 1, 'log_history': []}, [])
    assert f'Pass `{SWITCH}` to its chat template' in card
    plain = replace(RunRecord.read(run), thinking=None)
    assert 'to its chat template' not in model_card('a/b', plain, {'step': 1, 'log_history': []}, [])
