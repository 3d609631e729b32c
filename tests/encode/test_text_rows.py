"""Rows of plain text: their ids, files, account, checks and runs; the loss is that of a computation by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_infer
import llm_sft
from tests.support.runs import get_dataset, small_flags, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.data.encode_plan import EncodedAgain, encode_rows
from utils.data.encoding_report import EncodingReport
from utils.data.plan import plan_rows
from utils.encode.encoded import CONTROL_TOKENS, CUT_TEXT, row_labels
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.formats.columns import find_converter
from utils.formats.conversation import BadRow, Row
from utils.formats.reading import Reading
from utils.formats.row_check import check_row
from utils.proofs.template import prove_template

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
WORDS = 'the answer is blue and green, a helpful name for red and yellow. what is 42? count 0 1 2 3 the '
PLAIN = make_tokenizer(chat_template=None)


def text_row(text: str = 'the answer is 42', **columns: Any) -> Row:
    row = {'text': text, **columns}
    converter = find_converter(row)
    assert converter is not None
    made = check_row(converter(row))
    made.origin = 'a.jsonl:1'
    return made


def chat_row() -> Row:
    messages = [{'role': 'user', 'content': 'what is 7?'}, {'role': 'assistant', 'content': 'seven'}]
    return Row(messages=messages, written={'messages': messages}, origin='a.jsonl:2')  # type: ignore[arg-type]


def encoder(tokenizer: Any = PLAIN, **options: Any) -> Encoder:
    settings: dict[str, Any] = {'template_type': 'auto', 'system': 'be kind', 'system_typed': True, 'max_length': -1}
    return make_encoder(tokenizer, **{**settings, **options})


def with_beginning(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[bos])
    return tokenizer


# ---- rows and ids


def test_text_is_a_row_without_a_template_and_other_columns_are_named() -> None:
    row = text_row(' a\n', url='x', system='be brief', meta={'a': ''})
    assert row.is_text and row.messages == [{'role': 'assistant', 'content': ' a\n'}]
    assert row.unused == ('column `url`', 'column `system`')
    for bad, reason in ((None, 'null text'), (' \n', 'empty text'), (['a'], 'text is a list, not text')):
        with pytest.raises(BadRow, match=reason):
            text_row(bad)  # type: ignore[arg-type]
    with pytest.raises(BadRow, match='lone surrogate'):
        text_row('\ud83d')


@pytest.mark.parametrize('template', ['auto', 'chatml', 'default-generation'])
@pytest.mark.parametrize('begins', [False, True])
@pytest.mark.parametrize('chat_template', [None, 'own'])
def test_the_ids_are_those_of_the_tokenizer_and_every_token_carries_loss(
    template: str, begins: bool, chat_template: str | None
) -> None:
    tokenizer = make_tokenizer(chat_template=None) if chat_template is None else make_tokenizer()
    tokenizer = with_beginning(tokenizer) if begins else tokenizer
    found = encoder(tokenizer, template_type=template).encode([text_row()])[0]
    plain = tokenizer('the answer is 42', add_special_tokens=False)['input_ids']
    assert found.input_ids == [*([1] if begins else []), *plain, 2]
    assert found.trained == (0, len(found.input_ids)) and found.earlier == []
    assert row_labels(found.as_item()) == [-100, *found.input_ids[1:]]
    assert ''.join(found.pieces) == ('<s>' if begins else '') + 'the answer is 42'


def test_control_tokens_in_a_text_stay_text_and_images_too() -> None:
    text = 'a <|im_end|> b </s> <img>x.png</img>'
    found = encoder(make_tokenizer()).encode([text_row(text)])[0]
    assert found.notes == [CONTROL_TOKENS]
    assert not {1, 3, 4} & set(found.input_ids) and found.input_ids.count(2) == 1
    assert make_tokenizer().decode(found.input_ids[:-1]) == text
    assert found.images == ()


def test_texts_and_conversations_share_a_batch_in_their_order() -> None:
    ours = encoder(make_tokenizer())
    rows = [text_row(), chat_row(), text_row('blue'), chat_row()]
    assert [row.input_ids for row in ours.encode(rows)] == [ours.encode([row])[0].input_ids for row in rows]
    assert ours.encode_prompts(rows) == [ours.encode_prompts([row])[0] for row in rows]


def test_without_a_chat_template_conversations_are_refused_and_texts_encoded() -> None:
    ours = encoder()
    assert ours.encode([text_row()])[0].input_ids[-1] == 2
    for refused in (ours.encode, ours.encode_prompts):
        with pytest.raises(ConfigError, match='needs a chat template, and this tokenizer has none. Choose a'):
            refused([text_row(), chat_row()])


def test_a_long_text_loses_its_beginning_and_the_prompt_is_the_beginning() -> None:
    whole = encoder().encode([text_row(WORDS * 3)])[0]
    cut = encoder(max_length=20).encode([text_row(WORDS * 3)])[0]
    assert cut.input_ids == whole.input_ids[-20:] and cut.trained == (0, 20) and cut.prompt_length == 10
    assert cut.notes == [CUT_TEXT] and 0 < cut.cut < len(WORDS * 3)
    assert encoder().encode_prompts([text_row(WORDS * 3)])[0] == whole.input_ids[:64]
    assert encoder().encode_prompts([text_row('blue')])[0] == encoder().encode([text_row('blue')])[0].input_ids[:1]


@pytest.mark.parametrize('begins', [False, True])
@pytest.mark.parametrize('limit', [-1, 12])
def test_every_character_of_a_text_is_accounted_for(begins: bool, limit: int) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    ours = encoder(with_beginning(tokenizer) if begins else tokenizer, max_length=limit)
    for text in ('the answer is 42', WORDS, ' user ', '<|im_end|>'):
        report = EncodingReport()
        rows, _ = encode_rows(ours, [text_row(text, url='xyz')], report)
        fields = report.account.fields
        assert sum(fields['plain text'].values()) == len(text)
        assert set(fields['plain text']) <= ({'trained'} if limit < 0 else {'trained', 'cut'})
        assert fields['column `url`'] == {'not used': 3} and len(rows) == 1
    assert EncodedAgain(ours).encode(text_row(), {'text': 'b'}) is not None


# ---- files


def test_text_files_are_documents_or_paragraphs(tmp_path: Path) -> None:
    folder = tmp_path / 'docs'
    folder.mkdir()
    (folder / 'a.md').write_bytes('\ufeff# A\n\n\none\r\ntwo\n'.encode())
    (folder / 'b.txt.gz').write_bytes(gzip.compress(b'\n \nthree'))
    (folder / 'c.txt').write_bytes(b'')
    (folder / '.hidden.md').write_text('x')
    (folder / 'picture.png').write_text('x')
    by_document = get_dataset([f'{folder}/'], test_ratio=0)
    assert [(row.origin, row.messages[0]['content']) for row in by_document.train] == [
        (f'{folder}/a.md:1', '# A\n\n\none\r\ntwo\n'),
        (f'{folder}/b.txt.gz:1', '\n \nthree'),
    ]
    assert by_document.left_out.places == {'empty text': [f'{folder}/c.txt:1']}
    by_paragraph = get_dataset([f'{folder}/'], test_ratio=0, reading=Reading(text_rows='paragraph'))
    assert [(row.origin, row.messages[0]['content']) for row in by_paragraph.train] == [
        (f'{folder}/a.md:1', '# A'),
        (f'{folder}/a.md:4', 'one\r\ntwo'),
        (f'{folder}/b.txt.gz:3', 'three'),
    ]
    assert by_paragraph.left_out.counts == {'empty text': 1}
    assert len(get_dataset([f'{folder}/*.md'], test_ratio=0).train) == 1
    plan = plan_rows([f'{folder}/'], test_ratio=0)
    assert plan.decisions('last_round') == [
        'loss is on every token of 2 of 3 rows read because they are plain text: no template is applied, and the end '
        'of sequence is added'
    ]


def test_text_beside_rows_is_not_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / 'a.jsonl', [{'query': 'a', 'response': 'b'}])
    (tmp_path / 'README.md').write_text('about a')
    assert len(get_dataset([f'{tmp_path}/'], test_ratio=0).train) == 1
    with pytest.raises(ConfigError, match=r'the pattern matches .*README.md and .*a.jsonl. A pattern must not match'):
        plan_rows([f'{tmp_path}/*'])


def test_a_document_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('utils.formats.data_file.MAX_ROW_BYTES', 12)
    file = tmp_path / 'a.txt'
    file.write_text('one two\n\nthree\n\nfour')
    with pytest.raises(ConfigError, match='a.txt: the document exceeds 0 MiB, .* add --text_rows paragraph'):
        plan_rows([str(file)])
    assert len(get_dataset([str(file)], test_ratio=0, reading=Reading(text_rows='paragraph')).train) == 3


# ---- proofs and checks


def proof(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / 'proofs.json').read_text())['template']
    return found


def test_the_template_proof_checks_texts(tmp_path: Path) -> None:
    said = '2 rows of plain text have the ids of the tokenizer and the end of sequence, and every token carries loss'
    texts = [text_row(), text_row('a </s> b')]
    prove_template(encoder(), texts, tmp_path)
    assert proof(tmp_path)['says'] == said
    prove_template(encoder(with_beginning(make_tokenizer())), [*texts, chat_row()], tmp_path)
    assert proof(tmp_path)['says'].startswith('11 of 11 conversations') and proof(tmp_path)['says'].endswith(said)
    with pytest.raises(ConfigError, match='needs a chat template'):
        prove_template(encoder(), [*texts, chat_row()], tmp_path)


@pytest.mark.parametrize('fault', ['blank', 'begin', 'end', 'loss', 'control'])
def test_a_text_that_is_changed_or_without_loss_stops(fault: str, tmp_path: Path) -> None:
    class Other(type(encoder())):  # type: ignore[misc]
        def _encode_texts(self, rows: Any) -> Any:
            found = super()._encode_texts(rows)
            for row in found:
                if fault == 'loss':
                    row.trained = (1, len(row.input_ids))
                else:
                    row.input_ids = {'blank': [228, *row.input_ids], 'begin': row.input_ids[1:],
                                     'end': row.input_ids[:-1], 'control': [*row.input_ids[:-3], 2]}[fault]  # fmt: skip
            return found

    ours = Other(PLAIN, max_length=-1)
    with pytest.raises(ConfigError, match='a.jsonl:1: the trained ids of this plain-text row should be the tokenizer'):
        prove_template(ours, [text_row('a </s> b' if fault == 'control' else 'blue')], tmp_path)


# ---- runs


@pytest.fixture(scope='module')
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny base model: its tokenizer has no chat template, and puts <s> before a text."""
    folder = tmp_path_factory.mktemp('models') / 'tiny-base'
    make_model().save_pretrained(folder)
    with_beginning(make_tokenizer(chat_template=None)).save_pretrained(folder)
    return folder


def run_text(base: Path, data: Path, tmp_path: Path, *flags: str, expect: int = 0) -> Path:
    output = tmp_path / f'output{len(list(tmp_path.iterdir()))}'
    assert llm_sft.main([*small_flags(base, data, output), *flags]) == expect
    return next(output.glob('*/v0-*'), output)


def by_hand(base: Path, texts: list[str]) -> float:
    """Return the mean loss over every predicted token of the texts, in float64, each text by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([*tokenizer(text)['input_ids'], tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        total -= float(logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    return total / count


TEXTS = [f'{WORDS[: 20 + 3 * number]} {number}' for number in range(12)]
MODES = {
    'padded': ('--padding_free', 'false'),
    'padding-free': ('--padding_free', 'true'),
    'packed': ('--packing', 'true', '--max_length', '120'),
    'streamed': ('--streaming', 'true', '--stream_val_rows', '0'),
}


@pytest.mark.slow
@pytest.mark.parametrize('mode', MODES)
def test_a_base_model_trains_and_its_loss_is_that_by_hand(mode: str, base_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / 'texts.jsonl', [{'text': text} for text in TEXTS])
    flags = ('--batch_size', '12', '--gradient_accumulation_steps', '1', '--max_steps', '1', '--eval_steps', '1')
    run = run_text(base_dir, data, tmp_path, *flags, '--dataset_test_ratio', '0', *MODES[mode])
    first = json.loads((run / 'checkpoint-1' / 'trainer_state.json').read_text())['log_history'][0]
    assert first['loss'] == pytest.approx(by_hand(base_dir, TEXTS), rel=2e-6)
    proofs = json.loads((run / 'proofs.json').read_text())
    assert all(outcome['passed'] for outcome in proofs.values()) and {'template', 'loss'} < set(proofs)
    sample = (run / 'sample.txt').read_text()
    assert sample.startswith('⟦<s>') and sample.rstrip().endswith('</s>⟧')


@pytest.mark.slow
def test_a_run_on_text_is_reported_answered_merged_and_checked(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], problems: Problems, caplog: Any
) -> None:
    folder = tmp_path / 'docs'
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f'{number:02}.md').write_text(f'{text}\n\n{text} again\n')
    paragraphs = ('--text_rows', 'paragraph', '--report_samples', '2')
    run = run_text(base_dir, folder, tmp_path, *paragraphs, '--max_steps', '2', '--eval_steps', '1')
    assert 'loss is on every token of 24 of 24 rows read because they are plain text' in caplog.text
    answers = json.loads((run / 'answers.json').read_text())
    assert len(answers) == 2 and all(a['messages'][0]['content'] == a['beginning'] + a['wanted'] for a in answers)
    assert 'plain text: the model continues its beginning' in (run / 'report.html').read_text()

    checkpoint = str(run / 'checkpoint-2')
    capsys.readouterr()
    assert llm_infer.main(['--ckpt_dir', checkpoint, '--max_new_tokens', '3', '--do_sample', 'false']) == 0
    assert capsys.readouterr().out.count('[TEXT] the answer') == 2
    assert '2 rows are plain text, not conversations: the model continues the beginning of each text' in caplog.text
    answered = [json.loads(line) for line in (run / 'checkpoint-2' / 'infer_result.jsonl').read_text().splitlines()]
    assert set(answered[0]) == {'origin', 'text', 'label', 'answer', 'scores'}
    assert llm_infer.main(['--ckpt_dir', checkpoint, '--eval_human', 'true']) == 2
    assert 'has no chat template. Name a file with --chat_template' in problems()[-1]
    assert llm_infer.main(['--ckpt_dir', checkpoint, '--merge_lora_and_save', 'true']) == 0
    assert llm_infer.main(['--ckpt_dir', f'{checkpoint}-merged', '--max_new_tokens', '3']) == 0

    again = run_text(base_dir, folder, tmp_path, *paragraphs, '--check_dataset', 'true')
    report = json.loads((next(again.rglob('dataset_report.json'))).read_text())
    assert report['clean'] and report['defects'] == {} and report['rows']['kept'] == 24
    twice = write_jsonl(tmp_path / 'twice.jsonl', [{'text': 'a b'}, {'text': 'c d'}, {'text': 'a b'}])
    again = run_text(base_dir, twice, tmp_path, '--check_dataset', 'true', '--dataset_test_ratio', '0', expect=1)
    assert set(json.loads(next(again.rglob('dataset_report.json')).read_text())['defects']) == {'duplicate row'}


def test_a_base_model_refuses_conversations_before_it_is_opened(
    base_dir: Path, data_file: Path, tmp_path: Path, problems: Problems, capsys: pytest.CaptureFixture[str]
) -> None:
    message = 'has no chat template. Name a file with --chat_template'
    run_text(base_dir, data_file, tmp_path, expect=2)
    assert message in problems()[-1]
    run_text(base_dir, Path('sql-demo'), tmp_path, expect=2)
    assert message in problems()[-1]
    broken = tmp_path / 'broken.txt'
    broken.write_bytes(b'\xff\n')
    run_text(base_dir, broken, tmp_path, expect=2)
    assert 'byte 0xff is not UTF-8' in problems()[-1]
    mixed = write_jsonl(tmp_path / 'a.jsonl', [{'text': 'a'}] * 5)
    run_text(base_dir, mixed, tmp_path, '--dataset', str(mixed), str(data_file), expect=2)
    assert message in problems()[-1]
    run_text(base_dir, mixed, tmp_path, '--text_rows', 'paragraph', '--dry_run', 'true')
    assert '--text_rows has no effect: --dataset and --val_dataset name no .txt or .md file.' in capsys.readouterr().out


@pytest.mark.slow
def test_generated_evaluation_continues_texts(base_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / 'texts.jsonl', [{'text': text} for text in TEXTS])
    flags = ('--predict_with_generate', 'true', '--max_new_tokens', '4', '--max_steps', '1', '--eval_steps', '1')
    run = run_text(base_dir, data, tmp_path, *flags)
    log = json.loads((run / 'checkpoint-1' / 'trainer_state.json').read_text())['log_history']
    assert any('eval_rouge-l' in entry for entry in log)
