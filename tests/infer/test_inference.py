"""llm_infer.py on checkpoints of llm_sft.py: answers, chat, merge, and the logits that other programs get."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import GenerationConfig, LlamaConfig

import llm_infer
from tests.support.runs import write_jsonl
from tests.support.tiny_models import make_tokenizer
from utils.encode.make import make_encoder
from utils.encode.template_encoder import TemplateEncoder
from utils.formats.conversation import Message, Row, asked_turns
from utils.infer.chat import Chat, chat_in_terminal
from utils.infer.generation import generate_batch, generate_rows, generate_stream, generation_config, wanted_texts
from utils.preprocess import TEMPLATE_MAPPING

Run = Callable[..., Path]
GREEDY = ('--do_sample', 'false', '--max_new_tokens', '8')


@pytest.fixture
def checkpoint(run_sft: Run) -> Path:
    return run_sft('--learning_rate', '0.05', '--max_steps', '9') / 'checkpoint-9'


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_answers_the_validation_rows_of_the_run(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *GREEDY]) == 0
    rows = results(checkpoint / 'infer_result.jsonl')
    assert len(rows) == 4
    assert {'origin', 'messages', 'label', 'answer', 'scores'} == set(rows[0])
    assert all(re.fullmatch(r'.*qa\.jsonl:\d+', row['origin']) for row in rows)
    assert set(rows[0]['scores']) == {'rouge-1', 'rouge-2', 'rouge-l', 'bleu-4'}
    assert rows[0]['label'] in capsys.readouterr().out
    settings = json.loads((checkpoint / 'generation_config.json').read_text())
    assert settings['max_new_tokens'] == 8 and settings['do_sample'] is False


def test_greedy_answers_do_not_depend_on_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for size in ('1', '4'):
        target = tmp_path / f'{size}.jsonl'
        words = ['--ckpt_dir', str(checkpoint), *GREEDY, '--infer_batch_size', size, '--result_path', str(target)]
        assert llm_infer.main(words) == 0
        found.append([row['answer'] for row in results(target)])
    assert found[0] == found[1] and any(found[0])


def test_batches_equal_one_by_one_generation(model_dir: Path, tokenizer: Any) -> None:
    from utils.cli.arguments import InferArguments
    from utils.model import load_model

    model = load_model(model_dir, torch_dtype=torch.float32).eval()
    config = generation_config(InferArguments(do_sample=False, max_new_tokens=6), tokenizer, [])
    prompts = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [9, 9]]
    single = [generate_batch(model, [prompt], config)[0] for prompt in prompts]
    assert generate_rows(model, prompts, config, batch_size=3) == single
    assert len({tuple(ids) for ids in single}) > 1


def test_sampled_answers_are_reproducible(checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for name in ('a', 'b'):
        target = tmp_path / name
        words = ['--ckpt_dir', str(checkpoint), '--max_new_tokens', '8', '--result_path', str(target)]
        assert llm_infer.main(words) == 0
        found.append(target.read_text())
    assert found[0] == found[1]


def test_untuned_model_serves_without_a_checkpoint(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    target = tmp_path / 'base.jsonl'
    words = ['--model_id_or_path', str(model_dir), '--dataset', str(data_file), '--result_path', str(target)]
    assert llm_infer.main([*words, *GREEDY, '--dataset_test_ratio', '0.5', '--show_dataset_sample', '5']) == 0
    assert len(results(target)) == 5


@pytest.mark.slow
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(shown, encoding='gbk', write_through=True))
    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': '世界 🌍', 'response': 'b'}] * 4)
    words = ['--model_id_or_path', str(model_dir), '--dataset', str(file), '--dataset_test_ratio', '0.5', *GREEDY]
    assert llm_infer.main([*words, '--result_path', str(tmp_path / 'r.jsonl')]) == 0
    assert '[QUERY] 世界 ?\n'.encode('gbk') in shown.getvalue()
    lines = iter(['/ħ', '/exit'])
    monkeypatch.setattr('builtins.input', lambda prompt: next(lines))
    assert llm_infer.main([*words, '--eval_human', 'true']) == 0
    assert b'(/?: unknown command' in shown.getvalue()


def test_a_question_is_the_last_turn_of_the_user_and_results_of_tools_are_marked() -> None:
    call = {'type': 'function', 'function': {'name': 'weather', 'arguments': {}}}
    user: Message = {'role': 'user', 'content': 'how warm?'}
    asks: Message = {'role': 'assistant', 'content': '', 'tool_calls': [call]}
    result: Message = {'role': 'tool', 'content': '{"temp": 40}'}
    reply: Message = {'role': 'assistant', 'content': '40 degrees'}
    assert asked_turns([user, asks, result, reply]) == [
        ('QUERY', 'how warm?'),
        ('ASSISTANT', '[{"name": "weather", "arguments": {}}]'),
        ('TOOL', '{"temp": 40}'),
    ]
    assert asked_turns([user, reply, {**user, 'content': 'sure?'}, reply]) == [('QUERY', 'sure?')]
    assert asked_turns([reply]) == [] and asked_turns([result, reply]) == [('TOOL', '{"temp": 40}')]


@pytest.mark.slow
def test_the_result_of_a_tool_is_not_printed_as_the_question(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [
        {'role': 'user', 'content': 'how warm?'},
        {'role': 'tool', 'content': '{"temp": 40}'},
        {'role': 'assistant', 'content': '40'},
    ]
    file = write_jsonl(tmp_path / 'a.jsonl', [{'messages': turns}])
    words = ['--model_id_or_path', str(model_dir), '--dataset', str(file), '--result_path', str(tmp_path / 'r.jsonl')]
    assert llm_infer.main([*words, *GREEDY]) == 0
    assert capsys.readouterr().out.startswith('[QUERY] how warm?\n[TOOL] {"temp": 40}\n[LABEL] 40\n[ANSWER] ')


def test_rows_of_which_none_can_be_answered_are_one_error(
    model_dir: Path, tmp_path: Path, problems: Callable[[], list[str]]
) -> None:
    file = write_jsonl(tmp_path / 'a.jsonl', [{'query': 'a', 'response': 'b', 'images': ['a.png']}] * 9)
    words = ['--model_id_or_path', str(model_dir), '--dataset', str(file), '--dataset_test_ratio', '0.5']
    assert llm_infer.main([*words, '--result_path', str(tmp_path / 'r.jsonl'), *GREEDY]) == 2
    assert problems()[0].startswith(
        '--dataset: every validation row is skipped: 4 rows skipped: the row has images, but'
    )
    assert not (tmp_path / 'r.jsonl').exists()


def test_strangers_get_the_logits_that_inference_uses(checkpoint: Path, model_dir: Path, tokenizer: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from utils.export.merge import probe_logits
    from utils.loading.adapter import load_adapter
    from utils.model import load_model

    ours = probe_logits(load_adapter(load_model(model_dir, torch_dtype=torch.float32), checkpoint).eval(), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    untuned = probe_logits(base.eval(), tokenizer)
    plain = PeftModel.from_pretrained(base, str(checkpoint)).eval()
    assert torch.equal(probe_logits(plain, tokenizer), ours)
    assert float((untuned - ours).abs().max()) > 0.1

    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    merged = checkpoint.with_name('checkpoint-9-merged')
    opened = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert float((probe_logits(opened, AutoTokenizer.from_pretrained(merged)) - ours).abs().max()) < 1e-4
    assert '_name_or_path' not in json.loads((merged / 'config.json').read_text())
    assert AutoTokenizer.from_pretrained(merged).chat_template == tokenizer.chat_template


def test_a_checkpoint_is_merged_from_within(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    assert llm_infer.main(['--ckpt_dir', '.', '--merge_lora_and_save', 'true']) == 0
    assert (checkpoint.with_name('checkpoint-9-merged') / 'model.safetensors').is_file()


@pytest.mark.slow
def test_merged_folder_answers_as_the_adapter_does(checkpoint: Path) -> None:
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *GREEDY]) == 0
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    merged = checkpoint.with_name('checkpoint-9-merged')
    assert llm_infer.main(['--ckpt_dir', str(merged), *GREEDY]) == 0
    answers = [[r['answer'] for r in results(f / 'infer_result.jsonl')] for f in (checkpoint, merged)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_full_checkpoint_serves_its_own_weights(run_sft: Run) -> None:
    run = run_sft('--sft_type', 'full', '--max_steps', '3')
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-3'), *GREEDY]) == 0
    assert len(results(run / 'checkpoint-3' / 'infer_result.jsonl')) == 4


def test_adapter_on_other_base_weights_is_refused(
    checkpoint: Path, model_dir: Path, problems: Callable[[], list[str]], tmp_path: Path
) -> None:
    args = checkpoint / 'sft_args.json'
    other = tmp_path / 'other'
    shutil.copytree(model_dir, other)
    weights = other / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'\x00')
    args.write_text(args.read_text().replace(str(model_dir), str(other)))
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *GREEDY]) == 2
    assert 'the base weights differ' in problems()[-1]


def test_an_adapter_finds_its_base_model_in_another_folder(
    checkpoint: Path, model_dir: Path, problems: Callable[[], list[str]], tmp_path: Path
) -> None:
    args = checkpoint / 'sft_args.json'
    gone = tmp_path / 'gone'
    args.write_text(args.read_text().replace(str(model_dir), str(gone)))
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *GREEDY]) == 2
    assert problems()[-1].startswith(f'model directory {gone} is not there (looked in {tmp_path}). The checkpoint was ')
    assert 'name its folder with --model_id_or_path: its sha256 is compared' in problems()[-1]

    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--model_id_or_path', str(model_dir), *GREEDY]) == 0
    assert len(results(checkpoint / 'infer_result.jsonl')) == 4

    other = tmp_path / 'other'
    shutil.copytree(model_dir, other)
    weights = other / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'\x00')
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--model_id_or_path', str(other), *GREEDY]) == 2
    assert 'the base weights differ' in problems()[-1]


def test_another_base_model_typed_is_refused(checkpoint: Path, problems: Callable[[], list[str]]) -> None:
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--model_type', 'llama2-7b']) == 2
    assert any("--model_type 'llama2-7b' is not the base model of this checkpoint" in line for line in problems())


@pytest.mark.slow
def test_flags_not_typed_come_from_the_run_and_contradictions_are_warned_about(
    run_sft: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_sft('--template_type', 'default', '--max_steps', '3', '--system', 'you are s')
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-3'), *GREEDY, '--template_type', 'chatml']) == 0
    warned = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert [line for line in warned if 'trained with' in line] == [
        '--template_type chatml is not what the run was trained with (default).'
    ]


def test_chat_keeps_history_and_obeys_commands(tokenizer: Any) -> None:
    template = TEMPLATE_MAPPING['chatml']
    assert template is not None
    encoder = TemplateEncoder(tokenizer, template, name='chatml', system='S', max_length=-1)
    prompts: list[str] = []
    said: list[str] = []

    def answer(prompt: list[int], images: Sequence[str]) -> str:
        assert images == ()
        prompts.append(tokenizer.decode(prompt))
        return f'r{len(prompts)}'

    chat = Chat(encoder, answer, said.append)
    for line in ('hi', 'again', '/system kind', 'hi', '/clear', '/nope', '  ', 'x'):
        assert chat.handle(line)
    turn = '<|im_start|>{}\n{}<|im_end|>\n'
    first = turn.format('system', 'S') + turn.format('user', 'hi')
    end = '<|im_start|>assistant\n'
    assert prompts == [
        first + end,
        first + turn.format('assistant', 'r1') + turn.format('user', 'again') + end,
        turn.format('system', 'kind') + turn.format('user', 'hi') + end,
        turn.format('system', 'kind') + turn.format('user', 'x') + end,
    ]
    assert any('/nope: unknown command' in text for text in said)
    assert not chat.handle('/exit')
    said.clear()
    for line in ('/system new', '/system'):
        chat.handle(line)
    assert [line.split(',')[0] for line in said] == ['(system prompt set', '(system prompt removed']


@pytest.mark.parametrize('template', ['auto', 'chatml'])
def test_a_chat_past_max_length_drops_whole_oldest_turns(template: str, tokenizer: Any) -> None:
    turn = '<|im_start|>{}\n{}<|im_end|>\n'
    system = turn.format('system', 'kind')
    rounds = [turn.format('user', f'count {n}') + turn.format('assistant', 'yes') for n in range(4)]
    asked = [turn.format('user', f'count {n}') + '<|im_start|>assistant\n' for n in range(4)]
    wanted = [system + asked[0], system + rounds[0] + asked[1], system + rounds[1] + asked[2]]
    wanted.append(system + rounds[2] + asked[3])
    limit = max(len(tokenizer(text)['input_ids']) for text in wanted)
    prompts: list[str] = []
    said: list[str] = []

    def answer(prompt: list[int], images: Sequence[str]) -> str:
        prompts.append(tokenizer.decode(prompt))
        return 'yes'

    encoder = make_encoder(tokenizer, template_type=template, system='kind', system_typed=True, max_length=limit)
    chat = Chat(encoder, answer, said.append)
    for n in range(4):
        assert chat.handle(f'count {n}')
    assert prompts == wanted
    dropped = [text for text in said if 'were dropped with' in text]
    assert dropped == [
        f'(--max_length {limit} is reached: the oldest 1 of 2 questions were dropped with their replies)\n',
        f'(--max_length {limit} is reached: the oldest 1 of 2 questions were dropped with their replies)\n',
    ]
    chat.handle('count ' * 80)
    assert (
        len(prompts) == 4
        and f'--max_length {limit}: this line has ' in said[-1]
        and 'Shorten it' in said[-1]
        and len(chat.turns) == 4
    )
    assert encoder.max_length == limit


def test_chat_in_the_terminal_streams_and_leaves_at_the_end_of_input(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(['what is 3 and 3?', KeyboardInterrupt, '/clear', 'what is 4 and 4?'])

    def read(prompt: str) -> str:
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr('builtins.input', read)
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--eval_human', 'true', *GREEDY]) == 0
    out = capsys.readouterr().out
    assert '(conversation cleared)' in out and '(Ctrl-D or /exit leaves)' in out


def test_a_line_that_is_no_utf_8_keeps_the_chat(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The second is what a C locale makes of the first.
    lines = iter([UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid start byte'), 'a\udcff', '/clear'])

    def read(prompt: str) -> str:
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr('builtins.input', read)
    encoder = TemplateEncoder(tokenizer, TEMPLATE_MAPPING['default'], name='default', system='', max_length=99)
    chat_in_terminal(Chat(encoder, lambda prompt, paths: 'yes', lambda text: print(text, end='')))
    out = capsys.readouterr().out
    assert out.count('(this line is not UTF-8. Set the terminal to UTF-8)') == 2
    assert out.index('(conversation cleared)') > out.rindex('UTF-8')


def test_ctrl_c_stops_a_reply_and_keeps_the_chat(model_dir: Path, tokenizer: Any) -> None:
    from utils.cli.arguments import InferArguments
    from utils.model import load_model

    model = load_model(model_dir, torch_dtype=torch.float32).eval()
    args = InferArguments(do_sample=False, max_new_tokens=50, repetition_penalty=2.0)
    config = generation_config(args, tokenizer, [])
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    answer = generate_stream(model, tokenizer, [11, 12, 13], config, say)
    assert said[-1] == ' [stopped]'
    assert answer == ''.join(said[:-1])


@pytest.mark.slow
def test_a_run_trains_and_answers_rows_with_tools(run_sft: Run, tmp_path: Path) -> None:
    turns = [
        {'from': 'human', 'value': 'what is the weather?'},
        {'from': 'function_call', 'value': '{"name": "weather", "arguments": {"city": "a"}}'},
        {'from': 'observation', 'value': '{"sky": "blue"}'},
        {'from': 'gpt', 'value': 'the sky is blue.'},
    ]
    tools = json.dumps([{'name': 'weather', 'description': 'd', 'parameters': {'type': 'object', 'properties': {}}}])
    data = write_jsonl(tmp_path / 'tools.jsonl', [{'conversations': turns, 'tools': tools}] * 20)
    run = run_sft('--dataset', str(data), '--max_steps', '2')
    noted = json.loads((run / 'run.json').read_text())['data']['noted']
    assert sorted(noted.values()) == [20, 20]
    assert llm_infer.main(['--ckpt_dir', str(run / 'checkpoint-2'), *GREEDY]) == 0


STREAMED = {
    'indented lines': 'def f(x):\n    if x:\n        return  x\n\n\n    return 1\n  ',
    'several bytes a character': 'ab 你好，世界 🌍 ħ',
    'a blank at the start': '  count 1',
    'marks that are moved to the word before them': "the answer , it is n't 'a' . \n What ?",
}


class Typist:
    """A model that generates the given ids, one at a time."""

    device = 'cpu'
    config = LlamaConfig(vocab_size=400)

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def generate(self, *, input_ids: torch.Tensor, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for token in self.ids:
            streamer.put(torch.tensor([token]))
        streamer.end()


@pytest.mark.parametrize('clean_up', [False, True])
@pytest.mark.parametrize('metaspace', [None, 'first', 'always'])
@pytest.mark.parametrize('case', STREAMED)
def test_what_is_streamed_is_the_whole_answer(case: str, metaspace: str | None, clean_up: bool) -> None:
    tokenizer = make_tokenizer(metaspace=metaspace)
    tokenizer.clean_up_tokenization_spaces = clean_up
    if metaspace is not None:  # the other decoder steps of Llama's tokenizer
        decoder = decoders.Sequence(
            [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
        )
        tokenizer.backend_tokenizer.decoder = decoder
    ids = tokenizer(STREAMED[case], add_special_tokens=False)['input_ids']
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    config = GenerationConfig(eos_token_id=[2, 4], pad_token_id=5)
    said: list[str] = []
    answer = generate_stream(Typist([*ids, 4]), tokenizer, [7], config, said.append)
    assert answer == ''.join(said) == whole
    assert '\ufffd' not in whole
    assert clean_up or len(said) > len(whole) // 4
    if metaspace is not None and case == 'indented lines' and not clean_up:
        assert '\n    if x:\n        return  x\n\n\n    return 1\n' in whole


def test_bytes_that_are_no_text_do_not_end_the_stream() -> None:
    tokenizer = make_tokenizer()
    half = tokenizer.convert_tokens_to_ids(['ä', '½'])
    broken = [*half, *tokenizer('a long 界 end', add_special_tokens=False)['input_ids'], *half]
    config = GenerationConfig(eos_token_id=[2], pad_token_id=5)
    said: list[str] = []
    answer = generate_stream(Typist(broken), tokenizer, [7], config, said.append)
    assert answer == ''.join(said) == tokenizer.decode(broken)
    assert '\ufffd' in answer and len(said) > 3


CALLING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501


def test_a_tool_call_is_held_against_what_was_trained() -> None:
    tokenizer = make_tokenizer(chat_template=CALLING)
    encoder = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=12)
    call = {'type': 'function', 'function': {'name': 'see', 'arguments': {'a': 1}}}
    asked = Message(role='user', content='what is the answer?')
    rows = [
        Row(messages=[asked, Message(role='assistant', content='', tool_calls=[call])], origin='a:1'),
        Row(messages=[asked, Message(role='assistant', content=' the answer ')], origin='a:2'),
    ]
    config = GenerationConfig(eos_token_id=[2, 4])
    assert wanted_texts(encoder, rows, config) == ['<call>see({"a": 1})</call>', ' the answer ']
    assert encoder.max_length == 12
