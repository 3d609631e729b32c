"""--check_server against a loopback server that answers from the real tiny model: right, and broken in each way."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llm_infer
import llm_sft
from tests.support.openai_server import OpenAIServer, serving
from tests.support.runs import small_flags, write_jsonl
from tests.support.tiny_models import CHATML
from utils.base.errors import ConfigError
from utils.loading.adapter import load_adapter
from utils.model import load_model, load_tokenizer
from utils.serve import client
from utils.serve.compare import ROUNDING, Agreement, Asked, Checked, Expected, agree
from utils.serve.expected import Model, Next
from utils.serve.findings import findings
from utils.serve.request import Question

Check = Callable[..., int]
Problems = Callable[[], list[str]]
KEY = 'key-of-the-server'
# The turn of the assistant begins with a blank instead of a line end: as many tokens.
BLANK = CHATML.replace('assistant\n', 'assistant ')
LONGER = CHATML.replace('assistant\n', 'assistant \n')


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 30 rows with short replies."""
    rows = [{'query': f'what is {i}?', 'response': f'hi {i % 3}'} for i in range(30)]
    return write_jsonl(tmp_path_factory.mktemp('served') / 'qa.jsonl', rows)


@pytest.fixture(scope='module')
def checkpoint(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose answers differ from those of its base, and end after a few tokens."""
    output = tmp_path_factory.mktemp('run')
    flags = ('--lora_modules_to_save', 'embed_tokens', 'lm_head', '--max_steps', '40', '--eval_steps', '40')
    quick = ('--preflight', 'false', '--compare_rows', '0', '--drift', 'false', '--show_samples', '0')
    assert llm_sft.main([*small_flags(model_dir, data, output), *flags, *quick]) == 0
    return next(output.glob('*/*')) / 'checkpoint-40'


@pytest.fixture(scope='module')
def parts(model_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """Return what a server of the run has: its model, its tokenizer, and the ids that end an answer."""
    model = load_adapter(load_model(model_dir, torch_dtype=torch.float32), checkpoint).eval()
    tokenizer = load_tokenizer(checkpoint)
    return {'model': model, 'tokenizer': tokenizer, 'stops': tokenizer.convert_tokens_to_ids(['<|im_end|>', '</s>'])}


@pytest.fixture(scope='module')
def base(model_dir: Path) -> Any:
    return load_model(model_dir, torch_dtype=torch.float32).eval()


@pytest.fixture
def server(parts: dict[str, Any]) -> Iterator[OpenAIServer]:
    with serving(OpenAIServer(**parts, shows_ids='vllm')) as one:
        yield one


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / 'result.json'


@pytest.fixture
def check(checkpoint: Path, server: OpenAIServer, result: Path) -> Check:
    """Return a function that checks the server, and returns the exit code."""

    def run(*flags: str) -> int:
        words = ['--ckpt_dir', str(checkpoint), '--check_server', server.url, '--max_new_tokens', '8']
        return llm_infer.main([*words, '--result_path', str(result), *flags])

    return run


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the printed lines, without folders, with # for numbers that depend on rounding."""
    out = re.sub(r'/\S*/(\w+.jsonl)', r'\1', capsys.readouterr().out)
    return [re.sub(r'(at most|likely by) [\d.e-]+', r'\1 #', line) for line in out.splitlines()]


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a copy of the tokenizer with another chat template."""
    other = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    other.chat_template = template
    return other


def test_the_right_server_passes_and_gets_what_a_client_would_send(
    check: Check, server: OpenAIServer, result: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert check() == 0
    assert lines(capsys) == [
        'ok   prompts: token ids equal in 3 of 3 rows',
        'ok   adapter: active: 3 of the 3 rows that the base answers differently',
        'ok   answers: answers equal 3 of 3',
        'ok   first log probabilities: differ by at most # in 3 rows',
        'the server answers as the run: 3 of 3 rows compared',
    ]
    assert [path for path, _, _ in server.requests] == ['/v1/models', *['/v1/chat/completions', '/tokenize'] * 3]
    messages = [{'role': 'user', 'content': 'what is 0?'}]
    assert server.requests[1][1] == {
        'model': 'tiny', 'messages': messages, 'max_tokens': 8, 'temperature': 0, 'logprobs': True, 'top_logprobs': 5,
    }  # fmt: skip
    assert server.requests[2][1] == {'model': 'tiny', 'messages': messages, 'add_generation_prompt': True}
    assert {authorization for _, _, authorization in server.requests} == {''}

    record = json.loads(result.read_text())
    assert [record[name] for name in ('server', 'model', 'passed', 'refused')] == [server.url, 'tiny', True, {}]
    assert [finding['name'] for finding in record['findings']] == [
        'prompts', 'adapter', 'answers', 'first log probabilities',
    ]  # fmt: skip
    first = record['rows'][0]
    assert first['prompt_tokens'] == {'run': 13, 'server': 13} and first['prompt_ids_equal'] is True
    assert first['answers']['run'] == first['answers']['server'] == 'hi 1' != first['answers']['base']
    assert (first['answers_agree'], first['stops']) == ('equal', None)


def test_the_base_is_recognised(
    check: Check,
    server: OpenAIServer,
    base: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.model = base
    assert check() == 1
    printed = lines(capsys)
    assert printed[:3] == [
        'ok   prompts: token ids equal in 3 of 3 rows',
        "FAIL adapter: the adapter is not active: answers are the base's in 3 of the 3 rows that the base answers "
        'differently',
        '     -> Serve the merged folder, or name the adapter as the model: --served_model NAME here, model=NAME in '
        'your client.',
    ]
    assert printed[3].startswith(
        "FAIL answers: answers equal 0 of 3, 3 differ, first qa.jsonl:1 at token 1: run 'hi 1'"
    )
    assert printed[-1] == '2 checks failed: 3 of 3 rows compared'

    # Also if the answers of the base are within the rounding of the run.
    monkeypatch.setitem(ROUNDING, 'float32', 99.0)
    assert check() == 1
    printed = lines(capsys)
    assert printed[1].startswith("FAIL adapter: the adapter is not active: answers are the base's in 3 of the 3 rows")
    assert 'differ where two tokens are equally likely up to rounding' in printed[3]


@pytest.mark.parametrize(
    ('first', 'first_base', 'agrees'), [(0.4, 0.1, False), (0.1, 0.4, True), (0.1, 0.1, None), (None, 0.4, None)]
)
def test_equal_answers_are_told_apart_by_the_first_log_probabilities(
    first: float | None, first_base: float | None, agrees: bool | None
) -> None:
    answer: Any = SimpleNamespace(text='a')
    row = Checked(
        asked=Asked(question=Question(row=None, ids=[1], request={}), reply=client.Reply(text='a'), served_ids=[1]),  # type: ignore[arg-type]
        answer=answer,
        base_answer=answer,
        agreement=Agreement(kind='equal'),
        base_agreement=None,
        stops=None,
        first=first,
        first_base=first_base,
    )
    adapter = findings([row], None, has_base=True, rounding=0.05)[1]  # type: ignore[arg-type]
    assert (adapter.name, adapter.agrees) == ('adapter', agrees)
    assert ('answer all compared rows alike' in adapter.says) is (agrees is None)


@pytest.mark.parametrize(
    ('reply', 'why'),
    [
        (client.Reply(text='b'), 'far less likely here'),
        (client.Reply(text='', finish='length'), 'the server cut its answer at a maximum number of tokens'),
        (client.Reply(text='b', reasoning='c'), 'compared as a whole, because the server took the reasoning out'),
    ],
)
def test_a_difference_without_a_likelihood_says_why(reply: client.Reply, why: str) -> None:
    row = Checked(
        asked=Asked(
            question=Question(row=SimpleNamespace(origin='a:1'), ids=[1], request={}), reply=reply, served_ids=[1]
        ),  # type: ignore[arg-type]
        answer=SimpleNamespace(text='a'),  # type: ignore[arg-type]
        base_answer=None,
        agreement=Agreement(kind='different', at=1, model_rest='a', server_rest=reply.text),
        base_agreement=None,
        stops=None,
        first=None,
        first_base=None,
    )
    answers = findings([row], None, has_base=False, rounding=0.05)[2]  # type: ignore[arg-type]
    assert answers.says.endswith(f'({why})')


def test_a_log_probability_that_is_no_number_is_not_the_form_of_the_api() -> None:
    tokens = [{'token': 'a', 'logprob': 'much'}]
    content = {'choices': [{'message': {'content': 'a'}, 'logprobs': {'content': tokens}}]}
    with pytest.raises(ConfigError, match='does not answer in the form of the OpenAI API'):
        client.Server('http://localhost:1')._reply('/v1/chat/completions', content)


def test_a_check_in_which_no_answer_is_compared_fails() -> None:
    row = Checked(
        asked=Asked(question=Question(row=None, ids=[1], request={}), reply=client.Reply(text=''), served_ids=[1]),  # type: ignore[arg-type]
        answer=SimpleNamespace(text='a'),  # type: ignore[arg-type]
        base_answer=None,
        agreement=None,
        base_agreement=None,
        stops=None,
        first=None,
        first_base=None,
    )
    (answers,) = [f for f in findings([row], None, has_base=False, rounding=0.05) if f.name == 'answers']  # type: ignore[arg-type]
    assert answers.agrees is False and 'none compared, because the server took tool calls out' in answers.says


def test_a_busy_server_is_asked_for_ids_again(server: OpenAIServer) -> None:
    server.shows_ids = 'vllm'
    request = {'messages': [{'role': 'user', 'content': 'a'}]}
    asked = client.reach(server.url, None)
    server.faults['/tokenize'] = 429
    assert asked.prompt_ids(request) is None
    server.faults.clear()
    assert asked.prompt_ids(request), 'one refusal for lack of time does not end the comparison of ids'


def test_a_busy_server_is_asked_for_log_probabilities_again(server: OpenAIServer) -> None:
    request = {'messages': [{'role': 'user', 'content': 'a'}]}
    asked = client.reach(server.url, None)
    server.faults['/v1/chat/completions'] = 429
    with pytest.raises(client.Refused, match='HTTP 429'):
        asked.ask(request, max_tokens=2)
    server.faults.clear()
    assert asked.ask(request, max_tokens=2).first


@pytest.mark.parametrize('penalty', [1.0, 5.0])
def test_the_penalty_of_the_model_folder_is_that_of_its_server(
    penalty: float,
    check: Check,
    server: OpenAIServer,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = model_dir / 'generation_config.json'
    before = file.read_text()
    server.repetition_penalty = penalty
    try:
        file.write_text(json.dumps({**json.loads(before), 'repetition_penalty': 5.0}))
        with caplog.at_level('INFO'):
            code = check()
    finally:
        file.write_text(before)
    assert 'repetition_penalty = 5.0 because the generation settings of the model say so' in caplog.text
    answers = next(line for line in lines(capsys) if 'answers:' in line)
    assert (code, answers.startswith('ok')) == ((0, True) if penalty == 5 else (1, False)), answers


@pytest.mark.parametrize('shows', ['vllm', 'llama.cpp'])
def test_the_first_different_token_of_the_template_is_named(
    shows: Any, check: Check, server: OpenAIServer, parts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server.shows_ids = shows
    server.tokenizer = with_template(parts['tokenizer'], BLANK)
    assert check() == 1
    printed = lines(capsys)
    assert (
        printed[0]
        == r"FAIL prompts: template differs at token 13: run '\n' server ' ' (qa.jsonl:1; 3 of 3 rows differ)"
    )
    assert 'chat_template.jinja' in printed[1]
    paths = [path for path, _, _ in server.requests]
    assert paths.count('/apply-template') == (3 if shows == 'llama.cpp' else 0)


def test_without_ids_a_longer_prompt_is_found_by_its_length(
    check: Check, server: OpenAIServer, parts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server.shows_ids = None
    server.tokenizer = with_template(parts['tokenizer'], LONGER)
    assert check() == 1
    assert lines(capsys)[0] == (
        'FAIL prompts: template differs: the prompt has 13 tokens in the run and 14 on the server (qa.jsonl:1; 3 of 3 '
        'rows differ; the server shows no token ids)'
    )


@pytest.mark.parametrize('completes', ['ids', 'text', None])
def test_without_ids_a_prompt_of_equal_length_is_found_by_answers_without_the_template(
    completes: Any, check: Check, server: OpenAIServer, parts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server.shows_ids = None
    server.completes = completes
    server.gives_logprobs = None  # requests with logprobs are refused
    server.tokenizer = with_template(parts['tokenizer'], BLANK)
    assert check() == 1
    printed = lines(capsys)
    wanted = 'ok   prompts: number of tokens equal in 3 of 3 rows; the server shows no token ids'
    if completes is not None:
        wanted = (
            'FAIL prompts: template differs: the server shows no token ids, but it answers as the run if it gets the '
            'prompt of the run without a template (3 of 3 rows tried)'
        )
    assert printed[0] == wanted
    assert 'note first log probabilities: not compared: the server gives none' in printed
    refused = [body for path, body, _ in server.requests if path == '/v1/chat/completions' and 'logprobs' in body]
    assert len(refused) == 1, 'the server is asked once for what it refuses'


def test_a_server_that_stops_elsewhere_is_found(
    check: Check, server: OpenAIServer, parts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server.stops = []
    assert check() == 1
    late = lines(capsys)
    assert 'at token 4: run the end server ' in late[2]
    assert (
        'FAIL end of turn: the server goes on after the end of turn of the run in 3 of 3 rows (first qa.jsonl:1)'
        in late
    )
    assert 'eos_token_id in generation_config.json' in late[5]

    server.stops = [*parts['stops'], *parts['tokenizer']('hi')['input_ids'][-1:]]
    assert check() == 1
    early = lines(capsys)
    assert "run ' 1' server the end (less likely by #)" in early[2]
    assert 'FAIL end of turn: the server ends answers where the run goes on in 3 of 3 rows (first qa.jsonl:1)' in early


def test_hidden_tokens_after_the_end_of_turn_are_found(
    check: Check, server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def count_more(answer: dict[str, Any]) -> None:
        answer['usage']['completion_tokens'] = 8

    server.change = count_more
    assert check() == 1
    printed = lines(capsys)
    assert 'ok   answers: answers equal 3 of 3' in printed
    assert (
        'FAIL end of turn: the server goes on after the end of turn of the run in 3 of 3 rows (first qa.jsonl:1)'
        in printed
    )


def test_what_the_server_takes_out_of_an_answer_is_handled(
    check: Check, server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = iter([('reasoning_content', 'hi'), ('tool_calls', [{'id': 'a', 'type': 'function'}]), ('reasoning', 'no')])

    def take_out(answer: dict[str, Any]) -> None:
        name, value = next(texts)
        answer['choices'][0]['message'] |= {'content': '1' if 'reason' in name else None, name: value}
        del answer['usage']

    server.change = take_out
    server.shows_ids = None
    assert check() == 1
    printed = lines(capsys)
    assert printed[0] == 'note prompts: not compared: the server counts no prompt tokens; the server shows no token ids'
    assert printed[2].startswith(
        'FAIL answers: answers equal 1 of 3, 1 not compared, because the server took tool calls out of them, 1 differ, '
        r"first qa.jsonl:21 at token 1: run 'hi 1' server 'no\n1'"
    )


def test_a_model_without_an_adapter_is_compared_without_a_base(
    server: OpenAIServer, base: Any, model_dir: Path, data: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.model = base
    words = ['--model_id_or_path', str(model_dir), '--dataset', str(data), '--show_dataset_sample', '2']
    words += ['--check_server', f'{server.url}/v1/', '--max_new_tokens', '4', '--result_path', str(result)]
    assert llm_infer.main([*words, '--do_sample', 'true', '--score', 'exact', '--dtype', 'fp32']) == 0
    assert lines(capsys)[1] == 'note adapter: not compared with the base: no adapter is loaded here'
    assert json.loads(result.read_text())['rows'][0]['answers']['base'] is None


def test_rows_that_cannot_be_sent_or_are_refused_are_counted(
    check: Check, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], result: Path
) -> None:
    texts = write_jsonl(tmp_path / 'texts.jsonl', [{'text': 'what is a text?'}])
    file = write_jsonl(tmp_path / 'qa.jsonl', [{'query': f'what is {i}?', 'response': 'a'} for i in (1, 2)])
    server.refused_words = 'what is 2?'
    assert check('--dataset', str(texts), str(file)) == 1
    assert lines(capsys)[-3:] == [
        'FAIL requests: 1 row refused by the server: HTTP 400: these words are refused (qa.jsonl:2)',
        'note rows: 1 row not sent: plain text, which has no form in the chat API (texts.jsonl:1)',
        '1 checks failed: 1 of 3 rows compared',
    ]
    record = json.loads(result.read_text())
    assert record['not_sent'] == {'plain text, which has no form in the chat API': 1}
    assert record['refused'] == {'HTTP 400: these words are refused': 1}


def test_a_check_of_which_nothing_is_left_is_one_message(
    check: Check, server: OpenAIServer, tmp_path: Path, problems: Problems, result: Path
) -> None:
    file = write_jsonl(tmp_path / 'texts.jsonl', [{'text': 'what is a text?'}])
    assert check('--dataset', str(file)) == 2
    assert re.search(
        r'no row can be sent: 1 row not sent: plain text, .*\. Give other conversations with --dat', problems()[0]
    )
    server.faults['/v1/chat/completions'] = 500
    assert check('--served_model', 'tiny') == 2
    assert re.search(
        r'the server answers no row: 3 rows refused: HTTP 500: not now \(.*--served_model has the name', problems()[1]
    )
    assert len(problems()) == 2 and not result.exists()


def test_the_key_is_sent_and_never_shown(
    check: Check,
    server: OpenAIServer,
    result: Path,
    problems: Problems,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.key = KEY
    assert check() == 2
    assert problems()[0].endswith(
        'the server asks for a key, and OPENAI_API_KEY is not set (HTTP 401: no such key:). Set the environment '
        'variable OPENAI_API_KEY to the key of the server.'
    )
    monkeypatch.setenv('OPENAI_API_KEY', 'another-key')
    assert check() == 2
    assert 'does not accept that in OPENAI_API_KEY (HTTP 401: no such key: Bearer <secret>).' in problems()[1]

    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    server.refused_words = 'what is 0?'
    assert check() == 1
    assert {authorization for _, _, authorization in server.requests[-5:]} == {f'Bearer {KEY}'}
    shown = caplog.text + capsys.readouterr().out + result.read_text()
    assert KEY not in shown and 'another-key' not in shown


def test_the_model_is_the_only_one_or_is_named(check: Check, server: OpenAIServer, problems: Problems) -> None:
    server.names = ['base', 'tiny']
    assert check() == 2
    assert 'the server lists 2 models: base, tiny. Name the model to check: --served_model NAME.' in problems()[0]
    asked = client.reach(server.url, 'tiny')
    assert asked.model == 'tiny'
    server.names = []
    assert client.reach(server.url, None).model is None
    assert client.reach(server.url, None).ask({'messages': [{'role': 'user', 'content': 'a'}]}, max_tokens=1).finish
    assert 'model' not in server.requests[-1][1]
    server.faults['/v1/models'] = 404
    assert client.reach(server.url, 'tiny').model == 'tiny'
    assert check() == 2
    assert '/v1/models answers HTTP 404: not now. Give the address of an OpenAI-style server, e.g. ' in problems()[1]


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        (
            b'<html>hello\x1b[31m</html>',
            "answer in the form of the OpenAI API: '<html>hello [31m</html>'. Give the address",
        ),
        (b'{"data": [1]}', 'answer in the form of the OpenAI API: \'{"data": [1]}\'. Give the address'),
        (307, '/v1/models answers HTTP 307: not now. Give the address'),
        (0.6, '/v1/models gave no answer within 0.1 seconds. Wait until the server has loaded its model, or ask for'),
    ],
    ids=['a page', 'another list', 'a redirection', 'silence'],
)
def test_a_server_of_another_kind_is_one_message(
    fault: Any,
    message: str,
    check: Check,
    server: OpenAIServer,
    problems: Problems,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, '_OTHER_SECONDS', 0.1 if fault == 0.6 else 5)
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    server.faults['/v1/models'] = fault
    assert check() == 2
    assert len(problems()) == 1 and message in problems()[0]
    assert not [path for path, _, _ in server.requests if path == '/elsewhere'], 'the key is sent to no other address'


def test_an_answer_of_another_form_ends_the_check(server: OpenAIServer) -> None:
    asked = client.reach(server.url, None)
    server.change = lambda answer: answer.pop('choices')
    with pytest.raises(client.ConfigError, match='/v1/chat/completions does not answer in the form of the OpenAI API'):
        asked.ask({'messages': [{'role': 'user', 'content': 'a'}]}, max_tokens=1)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (
            ['--check_server', 'http://127.0.0.1:9'],
            'http://127.0.0.1:9: no server answers there (Connection refused). St',
        ),
        (['--check_server', 'localhost:8000'], "the address of a server, got 'localhost:8000'. Write e.g. http://"),
        (
            ['--check_server', 'http://a:99999999'],
            "the address of a server, got 'http://a:99999999'. Write e.g. http://",
        ),
        (['--check_server', 'http://me:it@a/v1'], 'takes an address without user, password, ? and #. Give the key of'),
        (['--check_server', 'http://a', '--eval_human', 'true'], 'answers no rows. Remove --eval_human, --merge_lora'),
    ],
    ids=['nobody', 'no scheme', 'no port', 'a password', 'a chat'],
)
def test_a_wrong_command_is_one_message(flags: list[str], message: str, checkpoint: Path, problems: Problems) -> None:
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *flags]) == 2
    assert len(problems()) == 1 and message in problems()[0]


def test_a_first_blank_that_decoding_removed_is_no_difference() -> None:
    words = ['yes', ' it', ' is']
    lost = True
    model: Any = SimpleNamespace(
        text=lambda ids: ''.join(words[index] for index in ids),
        lost_blank=lambda ids: lost,
        next_token=lambda question, begun, penalises: Next(likely={' is': -0.1, ' was': -3.0}, stop=-9.0),
    )
    expected = Expected(model=model, ids=[0, 1, 2], limit=8)
    question = Question(row=None, ids=[], request={})  # type: ignore[arg-type]
    for served in ('yes it is', ' yes it is'):
        assert agree(question, client.Reply(text=served), expected, rounding=0.05) == Agreement(kind='equal')
    lost = False
    added = agree(question, client.Reply(text=' yes it is'), expected, rounding=0.05)
    assert added is not None and not added.holds, 'a blank that the model did not say is a difference'
    lost = True
    found = agree(question, client.Reply(text=' yes it was'), expected, rounding=0.05)
    assert found == Agreement(kind='different', at=3, model_rest=' is', server_rest=' was', gap=pytest.approx(2.9))


@pytest.mark.parametrize(
    ('pieces', 'lost'), [(['▁yes', '▁it'], True), (['yes', '▁it'], False), (['Ġyes', 'Ġit'], False)]
)
def test_only_a_blank_that_decoding_removes_is_lost(pieces: list[str], lost: bool) -> None:
    tokenizer: Any = SimpleNamespace(
        convert_ids_to_tokens=lambda index: pieces[index],
        decode=lambda ids, **_: ''.join(pieces[i] for i in ids).replace('▁', ' ').removeprefix(' ').replace('Ġ', ' '),
    )
    model = Model(SimpleNamespace(), tokenizer, None, None)  # type: ignore[arg-type]
    assert model.lost_blank([0, 1]) is lost
    assert not model.lost_blank([])


def test_two_nearly_equal_tokens_differ_by_rounding(parts: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    model = Model(parts['model'], parts['tokenizer'], GenerationConfig(eos_token_id=parts['stops']), None)
    ids = parts['tokenizer'].apply_chat_template([{'role': 'user', 'content': 'what is 0?'}], return_dict=False)
    question = Question(row=None, ids=[*ids, *parts['tokenizer']('hi')['input_ids']], request={})  # type: ignore[arg-type]
    (best, one), (second, other) = list(model.next_token(question).likely.items())[:2]
    expected = Expected(model=model, ids=parts['tokenizer'](best)['input_ids'], limit=8)
    reply = client.Reply(text=second)
    gap = one - other
    for rounding, kind in ((gap * 1.01, 'rounding'), (gap * 0.99, 'different')):
        found = agree(question, reply, expected, rounding=rounding)
        assert found is not None and (found.kind, found.at) == (kind, 1)
        assert (found.model_rest, found.server_rest) == (best, second)
        assert found.gap == pytest.approx(gap)
    for served, holds in ((best, True), (best.strip(), True), (f'\n{best}', False)):
        found = agree(question, client.Reply(text=served), expected, rounding=0.0)
        assert found is not None and found.holds is holds, 'a server may remove white space, and not add it'
    absent = next(
        letter for letter in string.ascii_uppercase if model.next_token(question).log_probability(letter) is None
    )
    unlikely = agree(question, client.Reply(text=absent), expected, rounding=9.0)
    assert unlikely is not None and (unlikely.kind, unlikely.gap) == ('different', None)
