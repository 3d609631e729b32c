"""Vision models: rows with images through both programs, the ids of the models' own processors, bad images."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import llm_infer
import llm_sft
from tests.support.runs import get_dataset, small_flags, write_jsonl
from tests.support.tiny_models import make_tokenizer
from tests.support.vision_models import (
    GOLDENS,
    NAMES,
    QWEN3_VL,
    QWEN25_VL,
    QWEN_VL,
    SPECIAL,
    make_image_processor,
    make_seeing_model,
    make_seeing_tokenizer,
    picture_rows,
    read_json,
    seeing_folder,
)
from utils.base.errors import ConfigError
from utils.base.names import LossScope
from utils.data.collator import Collator
from utils.data.encode_plan import EncodedAgain, encode_rows
from utils.data.encoding_report import EncodingReport
from utils.data.plan import plan_rows
from utils.encode.account import Account
from utils.encode.chat_renderer import ChatRenderer
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import RowRefused
from utils.encode.make import make_encoder
from utils.encode.row_texts import row_texts
from utils.formats.conversation import Row
from utils.infer.generation import generate_rows
from utils.loading.image_processors import open_images
from utils.loading.info import LoadOptions
from utils.loading.layers import find_towers
from utils.loading.opening import get_model_tokenizer
from utils.loading.weights import locate
from utils.model import MODEL_MAPPING, get_model_info, load_model, load_tokenizer
from utils.proofs.template import prove_template
from utils.train.prepare import prepare_model

KEYS = (QWEN_VL, QWEN25_VL, QWEN3_VL)
PICTURES = [str(GOLDENS / 'qwenvl-a' / name) for name in NAMES]


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tiny checkpoint of each vision family."""
    home = tmp_path_factory.mktemp('seeing')
    return {key: seeing_folder(key, home / key) for key in KEYS}


@pytest.fixture(scope='module')
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_rows(tmp_path_factory.mktemp('pictures') / 'data')


def open_seeing(folder: Path, *, max_length: int = -1, max_pixels: int | None = None) -> tuple[Any, Any, Any]:
    """Return model, tokenizer and encoder of a checkpoint folder, as the programs open them."""
    info = get_model_info(next(k for k in KEYS if MODEL_MAPPING[k].model_id_or_path.endswith(folder.name)), str(folder))
    options = LoadOptions(torch_dtype=torch.float32)
    model, tokenizer = get_model_tokenizer(info, locate(info, revision='master'), options)
    images = open_images(model, tokenizer, folder, max_pixels=max_pixels)
    encoder = make_encoder(
        tokenizer, template_type=info.template, system='be brief', system_typed=False, max_length=max_length,
        images=images,
    )  # fmt: skip
    return model.eval(), tokenizer, encoder


def ask(query: str, reply: str = 'blue', **more: Any) -> Row:
    turns = [{'role': 'user', 'content': query}, {'role': 'assistant', 'content': reply}]
    return Row(messages=turns, origin='test:1', **more)  # type: ignore[arg-type]


# The original checkpoint through the public path


def test_the_original_qwen_vl_opens_to_its_logits_and_greedy_tokens(tmp_path: Path) -> None:
    expected = load_file(GOLDENS / 'qwenvl-a' / 'expected.safetensors')
    folder = tmp_path / 'Qwen-VL'
    shutil.copytree(GOLDENS / 'qwenvl-a', folder)
    make_tokenizer(vocab_size=280).save_pretrained(folder)
    for key in ('qwen-vl', 'qwen-vl-chat'):
        info = replace(MODEL_MAPPING[key], model_id_or_path=str(folder))
        model, _ = get_model_tokenizer(info, locate(info, revision='master'), LoadOptions(torch_dtype=torch.float32))
        model.eval()
        pixels, checked = expected['pixel_values'], 0
        with torch.no_grad():
            assert (model.visual(pixels) - expected['image_features']).abs().max() <= 1e-4
            for prefix in ('', 'padded_'):
                ids = expected[f'{prefix}input_ids']
                mask = expected['attention_mask'] if prefix else torch.ones_like(ids)
                logits = model(ids, attention_mask=mask, pixel_values=pixels).logits
                assert (logits - expected[f'{prefix}logits'])[mask == 1].abs().max() <= 1e-4
                whole = model.generate(
                    input_ids=ids, attention_mask=mask, pixel_values=pixels, do_sample=False, max_new_tokens=12,
                    min_new_tokens=12, pad_token_id=0,
                )  # fmt: skip
                assert torch.equal(whole[:, ids.shape[1] :], expected[f'{prefix}generated'])
                checked += 1
        assert checked == 2


def test_the_tokenizer_of_qwen_vl_has_its_image_tags(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders[QWEN_VL], model_type=QWEN_VL)
    start = read_json(folders[QWEN_VL] / 'config.json')['visual']['image_start_id']
    assert tokenizer('a<img><imgpad></img>b')['input_ids'][1:-1] == [start, start + 2, start + 1]
    assert tokenizer.convert_tokens_to_ids('<ref>') == start - 6


# The ids of a row


def two_turns(first: list[dict[str, str]], second: list[dict[str, str]], system: str | None) -> list[dict[str, Any]]:
    """Return a conversation with content items, as a processor expects it."""
    turns: list[dict[str, Any]] = [
        {'role': 'user', 'content': first},
        {'role': 'assistant', 'content': [{'type': 'text', 'text': 'blue'}]},
        {'role': 'user', 'content': second},
        {'role': 'assistant', 'content': [{'type': 'text', 'text': 'it is yellow, 你好'}]},
    ]
    return [{'role': 'system', 'content': [{'type': 'text', 'text': system}]}, *turns] if system else turns


def make_processor(key: str, tokenizer: Any) -> Any:
    """Return transformers' processor of a family, without its video part, which needs torchvision."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    base = {QWEN25_VL: transformers.Qwen2_5_VLProcessor, QWEN3_VL: transformers.Qwen3VLProcessor}[key]

    class WithoutVideo(base):  # type: ignore[misc, valid-type]
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token, self.video_token = SPECIAL[2:]
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(SPECIAL[2:])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return WithoutVideo(make_image_processor(), tokenizer, chat_template=tokenizer.chat_template)


@pytest.mark.parametrize('key', [QWEN25_VL, QWEN3_VL])
def test_a_row_has_the_ids_and_pixels_of_the_models_own_processor(key: str, folders: dict[str, Path]) -> None:
    _, tokenizer, encoder = open_seeing(folders[key])
    processor = make_processor(key, tokenizer)
    a, b = ({'type': 'image', 'path': path} for path in PICTURES)
    said = [{'type': 'text', 'text': text} for text in ('what is it? ', 'and ', ' now?\n\n', '{"key": [1]}')]
    conversations = [
        two_turns([a, said[0]], [said[1], b, said[2]], None),
        two_turns([said[0]], [b, a, b], 'be brief'),
        two_turns([said[1], a, said[2], b, said[3]], [said[0]], 'be brief'),
        two_turns([said[0]], [said[3]], None),
    ]
    for turns in conversations:
        whole = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors='pt')
        prompt = processor.apply_chat_template(
            turns[:-1], tokenize=True, return_dict=True, return_tensors='pt', add_generation_prompt=True
        )
        text = [
            {'role': t['role'], 'content': ''.join(i.get('text') or f'<img>{i["path"]}</img>' for i in t['content'])}
            for t in turns
        ]
        row = Row(messages=text, origin='test:1')  # type: ignore[arg-type]
        encoded = encoder.encode([row])[0]
        assert encoded.input_ids == whole['input_ids'][0].tolist() and encoded.notes == []
        assert encoder.encode_prompts([row])[0] == prompt['input_ids'][0].tolist()
        assert encoded.prompt_length == encoded.trained[0] == prompt['input_ids'].shape[1]
        start, end = encoded.trained
        assert tokenizer.decode(encoded.input_ids[start:end]) == 'it is yellow, 你好<|im_end|>'
        extra = encoder.images.inputs(torch.tensor([encoded.input_ids]), encoded.images)
        assert encoder.image_paths(row) == encoded.images
        names = ('pixel_values', 'image_grid_thw', 'mm_token_type_ids') if encoded.images else ()
        assert set(extra) == set(names)
        assert all(torch.equal(extra[name], whole[name]) for name in names)


@pytest.mark.parametrize('key', [QWEN25_VL, QWEN3_VL])
def test_the_template_is_proven_on_rows_with_pictures(
    key: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, encoder = open_seeing(folders[key])
    a, b = (f'<img>{path}</img>' for path in PICTURES)
    rows = [ask(f'{a}what is it?'), ask(f'and {b}{a} now?'), ask('no picture')]
    prove_template(encoder, rows, tmp_path)
    found = read_json(tmp_path / 'proofs.json')['template']
    assert found['passed'] and found['equal'] >= len(rows) + 9 and 'different' not in found
    assert f'({len(rows)} of your rows, 10 probes)' in found['says']
    plain = ChatRenderer.apply

    def without_an_end(self: ChatRenderer, chats: list[Any], *options: Any) -> Any:
        said = plain(self, chats, *options)
        end = '<|vision_end|>'
        return said.replace(end, '') if isinstance(said, str) else [text.replace(end, '') for text in said]

    monkeypatch.setattr(ChatRenderer, 'apply', without_an_end)
    with pytest.raises(ConfigError, match=r"explains this: token \d+, .* the chat template has '<\|vision_end\|>'"):
        prove_template(encoder, rows[1:2], tmp_path)


def test_the_template_of_qwen_vl_is_proven_without_one_to_compare(folders: dict[str, Path], tmp_path: Path) -> None:
    _, _, encoder = open_seeing(folders[QWEN_VL])
    prove_template(encoder, [ask('no picture'), ask(f'<img>{PICTURES[0]}</img>what is it?')], tmp_path)
    found = read_json(tmp_path / 'proofs.json')['template']
    assert found['passed'] and found['says'].startswith("the tokenizer has no chat template to compare 'chatml' with")
    assert '(1 of your rows, 10 probes)' in found['says']


def test_a_qwen_vl_row_is_text_around_slots(folders: dict[str, Path]) -> None:
    _, tokenizer, encoder = open_seeing(folders[QWEN_VL])
    start = encoder.images.slot - 2
    a, b = PICTURES
    row = ask(f'Picture 1: <img>{a}</img>\nPicture 2:<img></img> what?', images=[b])
    encoded = encoder.encode([row])[0]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)['input_ids'])

    slots = [start, *[start + 2] * 16, start + 1]
    prompt = [
        *ids('<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nPicture 1: '), *slots,
        *ids('\nPicture 2:'), *slots, *ids(' what?<|im_end|>\n<|im_start|>assistant\n'),
    ]  # fmt: skip
    assert encoded.input_ids == [*prompt, *ids('blue<|im_end|><|endoftext|>')]
    assert encoded.trained == (len(prompt), len(encoded.input_ids)) and encoded.prompt_length == len(prompt)
    assert encoded.images == (a, b) and encoded.notes == []
    assert encoder.encode_prompts([row])[0] == prompt


@pytest.mark.parametrize('key', KEYS)
def test_control_tokens_in_a_text_cannot_become_an_image(key: str, folders: dict[str, Path]) -> None:
    _, _, encoder = open_seeing(folders[key])
    slot = encoder.images.slot
    typed = ask(f'<imgpad><|image_pad|> <img>{PICTURES[0]}</img> {encoder.images.mark} <|im_end|>', 'a<|image_pad|>')
    if key == QWEN_VL:  # here the placeholder is a tag that names a file
        with pytest.raises(RowRefused, match='an image does not exist or is not a file'):
            encoder.encode([typed])
        typed = ask(f'<imgpad></img> <img>{PICTURES[0]}</img> <|im_end|>', 'a<imgpad>')
    encoded = encoder.encode([typed])[0]
    assert encoded.input_ids.count(slot) == encoder.images.count(PICTURES[0])
    assert any('control tokens' in note for note in encoded.notes)


def test_a_row_is_never_cut_within_an_image(folders: dict[str, Path]) -> None:
    row = ask(f'name a colour <img>{PICTURES[0]}</img>')
    for key in KEYS:
        _, _, encoder = open_seeing(folders[key])
        whole = encoder.encode([row])[0]
        first = whole.input_ids.index(encoder.images.slot)
        encoder.max_length = len(whole.input_ids) - first + 1
        cut = encoder.encode([row])[0]
        assert cut.input_ids == whole.input_ids[first - 1 :] and cut.images == whole.images
        prompt = whole.input_ids[: whole.prompt_length]
        for encode, ids in ((encoder.encode, whole.input_ids), (encoder.encode_prompts, prompt)):
            encoder.max_length = len(ids) - first
            with pytest.raises(RowRefused, match='would cut an image off'):
                encode([row])


def test_fewer_pixels_make_fewer_tokens(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / 'large.png')
    Image.new('RGB', (224, 168)).save(path)
    counted = []
    for limit in (None, 8 * 28 * 28, 4 * 28 * 28):
        images = open_seeing(folders[QWEN25_VL], max_pixels=limit)[2].images
        grid = images.pixels([path])['image_grid_thw']
        assert images.count(path) * 4 == int(grid.prod())
        counted.append(images.count(path))
    assert counted == [12, 6, 2] and '--max_pixels' not in caplog.text
    with pytest.raises(ConfigError, match='--max_pixels takes 3136 or more for this model, got 3135'):
        open_seeing(folders[QWEN25_VL], max_pixels=3135)
    open_seeing(folders[QWEN_VL], max_pixels=4 * 28 * 28)
    assert '--max_pixels has no effect: every image becomes 56 x 56' in caplog.text


def test_pictures_are_turned_as_the_camera_says(tmp_path: Path, folders: dict[str, Path]) -> None:
    _, _, encoder = open_seeing(folders[QWEN25_VL])
    upright = Image.open(PICTURES[0]).convert('RGB').resize((56, 112))
    upright.save(tmp_path / 'upright.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / 'lying.png', exif=exif)
    first, second = (encoder.images.pixels([str(tmp_path / f'{name}.png')]) for name in ('upright', 'lying'))
    assert first['image_grid_thw'].tolist() == second['image_grid_thw'].tolist() == [[1, 8, 4]]
    assert torch.equal(first['pixel_values'], second['pixel_values'])


# Rows of data files


def test_images_are_read_from_every_shape_of_row(tmp_path: Path) -> None:
    turns = [{'role': 'user', 'content': '<img></img>what?'}, {'role': 'assistant', 'content': 'x'}]
    items = [{'type': 'image'}, {'type': 'text', 'text': 'what?'}]
    with_path = [{'type': 'image', 'image': 'a.png'}, {'type': 'text', 'text': 'what?'}]
    spoken = [{'from': 'human', 'value': '<img></img>what?'}, {'from': 'gpt', 'value': 'x'}]
    shapes: list[tuple[dict[str, Any], list[str]]] = [
        ({'query': '<img></img>what?', 'response': 'x', 'images': 'a.png'}, ['a.png']),
        ({'query': '<img></img>what?', 'response': 'x', 'images': ['a.png']}, ['a.png']),
        ({'query': '<img></img>what?', 'response': 'x', 'images': '["a.png"]'}, ['a.png']),
        ({'instruction': '<img></img>what?', 'input': '', 'output': 'x', 'images': ['a.png']}, ['a.png']),
        ({'messages': turns, 'images': ['a.png']}, ['a.png']),
        ({'conversations': spoken, 'images': ['a.png']}, ['a.png']),
        ({'messages': [{'role': 'user', 'content': items}, turns[1]], 'images': ['a.png']}, ['a.png']),
        ({'messages': [{'role': 'user', 'content': with_path}, turns[1]], 'images': None}, []),
    ]
    for number, (row, images) in enumerate(shapes):
        file = write_jsonl(tmp_path / f'{number}.jsonl', [row])
        read = get_dataset([str(file)], test_ratio=0).train[0]
        tag = '<img>a.png</img>' if not images else '<img></img>'
        assert read.messages[-2]['content'] == f'{tag}what?', row
        assert (read.images, read.folder) == (images, str(tmp_path))
    bad = [
        ({'query': 'a', 'response': 'b', 'images': [1]}, 'images is neither a path nor a list of paths'),
        ({'query': 'a', 'response': 'b', 'images': [{'bytes': 'x'}]}, 'an image has neither bytes nor a path'),
        ({'query': 'a', 'response': 'b', 'images': '[a'}, 'images is text that is not JSON'),
    ]
    good = {'query': 'a', 'response': 'b', 'images': ''}
    for row, reason in bad:
        rows = get_dataset([str(write_jsonl(tmp_path / 'bad.jsonl', [good, row]))], test_ratio=0)
        assert len(rows.train) == len(rows.left_out) == 1 and next(iter(rows.left_out.counts)).startswith(reason)
    video = {'messages': [{'role': 'user', 'content': [{'type': 'video', 'video': 'a.mp4'}]}, turns[1]]}
    rows = get_dataset([str(write_jsonl(tmp_path / 'bad.jsonl', [{'messages': turns}, video]))], test_ratio=0)
    assert next(iter(rows.left_out.counts)) == 'user turn has an item of type video; known types are text and image'


def make_bad_pictures(folder: Path) -> dict[str, str]:
    """Write rows with one fault each. Returns the message for each."""
    folder.mkdir()
    shutil.copy(PICTURES[0], folder / 'a.png')
    shutil.copy(PICTURES[0], folder.parent / 'outside.png')
    (folder / 'text.png').write_text('not an image', encoding='utf-8')
    Image.new('1', (9500, 9500)).save(folder / 'huge.png')
    Image.new('1', (3, 1000)).save(folder / 'narrow.png')
    said = {
        '<img>gone.png</img>': 'an image does not exist or is not a file',
        '<img>text.png</img>': 'an image cannot be read: it is damaged, or its format is not one of',
        '<img>huge.png</img>': 'an image is too large',
        '<img>narrow.png</img>': 'an image is too narrow',
        '<img>../outside.png</img>': 'an image leaves the folder of its data file',
        '<img>https://example.org/a.png</img>': 'an image is a URL, and images are not downloaded',
        'no tag': 'an image has no tag: the row has more images than tags',
        '<img></img><img></img>': 'an image is missing: the row has fewer images than empty tags',
    }
    rows = [{'query': '<img></img> good', 'response': 'x', 'images': 'a.png'}]
    for query in said:
        rows.append(
            {'query': query, 'response': 'x', 'images': 'a.png' if 'img>' not in query or '><' in query else ''}
        )
    write_jsonl(folder / 'rows.jsonl', rows)
    return said


def test_rows_with_bad_images_are_left_out_counted_and_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    said = make_bad_pictures(tmp_path / 'data')
    rows = get_dataset([str(tmp_path / 'data' / 'rows.jsonl')], test_ratio=0).train
    assert len(rows) == len(said) + 1
    for key, unusable in ((QWEN25_VL, 8), (QWEN_VL, 7)):
        report = EncodingReport()
        _, kept = encode_rows(open_seeing(folders[key])[2], rows, report)
        assert len(kept) == len(rows) - unusable
        assert len(report.left_out) == unusable
        for line, (query, reason) in enumerate(said.items(), start=2):
            if key == QWEN_VL and 'narrow' in query:
                continue  # it is scaled to a square like any other image
            found = [p for r, named in report.left_out.places.items() if r.startswith(reason) for p in named]
            path = (re.findall(r'<img>([^<]+)</img>', query) or ['' if '><' in query else 'a.png'])[0]
            assert len(found) == 1 and found[0].startswith(f'{tmp_path}/data/rows.jsonl:{line}'), (query, found)
            assert path in found[0] and (f'[{path}' in found[0] or f'/{path}]' in found[0] or not path)


def test_a_model_that_sees_nothing_says_so(tmp_path: Path, tokenizer: Any) -> None:
    encoder = AutoEncoder(tokenizer, system=None, max_length=-1)
    report = EncodingReport()
    rows = [ask('<img></img>what?', images=['a.png']), ask('an html <img>a.png</img> tag'), ask('a <img src="x"> tag')]
    _, kept = encode_rows(encoder, rows, report)
    assert kept == rows[1:]
    assert report.lines() == [
        '1 row skipped: the row has images, but images are not supported for this model (test:1 [a.png])',
        '1 row noted: image tags in the text, but images are not supported for this model: kept as plain text (test:1)',
    ]


def picture_row(rng: random.Random) -> dict[str, Any]:
    """Return a row with up to two pictures in one of the three forms, with or without an earlier round."""

    def word() -> str:
        return rng.choice(['a', 'img', 'user', 'no', 'the answer', 'what is it', '.png'])

    pictures = rng.sample(PICTURES, rng.randrange(3))
    form = rng.choice(['tags', 'column', 'items'])
    content: Any = ''.join(f'<img>{picture}</img>' for picture in pictures) + word()
    if form == 'column':
        content = '<img></img>' * len(pictures) + word()
    if form == 'items':
        content = [{'type': 'image', 'image': picture} for picture in pictures]
        content.insert(rng.randrange(len(content) + 1), {'type': 'text', 'text': word()})
    turns: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        turns = [{'role': 'user', 'content': word()}, {'role': 'assistant', 'content': word()}]
    turns += [{'role': 'user', 'content': content}, {'role': 'assistant', 'content': word()}]
    return {'messages': turns, 'images': pictures if form == 'column' else []}


@pytest.mark.parametrize('scope', ['last_round', 'all_rounds'])
@pytest.mark.parametrize('key', KEYS)
def test_random_rows_with_images_are_accounted_for_in_full(
    key: str, scope: LossScope, folders: dict[str, Path]
) -> None:
    rng = random.Random(0)
    _, _, encoder = open_seeing(folders[key])
    encoder.loss_scope = scope
    again = EncodedAgain(encoder)
    pictured = 0
    for _ in range(200):
        raw = picture_row(rng)
        row = again.convert(raw)
        account = Account()
        encoded = encoder.encode([row])[0]
        account.add(row, encoded, again)
        assert account.unused == {}, raw
        counted = sum(count for counts in account.fields.values() for count in counts.values())
        assert counted == sum(len(row_text.text) for row_text in row_texts(raw))
        replies = [len(turn['content']) for turn in raw['messages'] if turn['role'] == 'assistant']
        trained = sum(replies) if scope == 'all_rounds' else replies[-1]
        assert account.fields['reply text'].get('trained') == trained, raw
        assert set(account.fields['user text']) <= {'context', 'structure'}, raw
        assert account.fields.get('images', {}).keys() <= {'context'}, raw
        pictured += bool(encoded.images)
    assert pictured > 80


def test_images_of_a_row_that_show_nothing_new_are_not_taken_for_text(folders: dict[str, Path]) -> None:
    _, _, encoder = open_seeing(folders[QWEN3_VL])
    raw = {'query': f'<img>{PICTURES[0]}</img>is it?', 'response': 'it', 'extra': PICTURES[0]}
    again = EncodedAgain(encoder)
    row = again.convert(raw)
    account = Account()
    account.add(row, encoder.encode([row])[0], again)
    assert account.unused == {'column `extra`': 1}
    assert account.fields['user text'] == {'context': len(raw['query'])}


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_a_picture_damaged_after_its_header_stops_the_run_by_name(
    workers: int, tmp_path: Path, folders: dict[str, Path], problems: Any
) -> None:
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'cut.png').write_bytes(Path(PICTURES[0]).read_bytes()[:3000])
    row = {'query': '<img>cut.png</img>what?', 'response': 'x'}
    file = write_jsonl(tmp_path / 'data' / 'rows.jsonl', [row, row, row])
    words = [*small_flags(folders[QWEN_VL], file, tmp_path / 'out'), '--dataloader_num_workers', str(workers)]
    assert llm_sft.main(words) == 2
    assert len(problems()) == 1
    assert problems()[0].startswith(
        f"image '{tmp_path}/data/cut.png' cannot be read: it is damaged, or its format is not one of"
    )
    assert 'Traceback' not in problems()[0]


# Image columns of parquet files, as `datasets` writes them


def image_cells(names: list[str]) -> list[dict[str, Any]]:
    return [{'bytes': (GOLDENS / 'qwenvl-a' / name).read_bytes(), 'path': name} for name in names]


def parquet_of(rows: list[Any], file: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def items(*kinds: str) -> list[dict[str, Any]]:
    return [{'type': kind, 'text': 'name a colour' if kind == 'text' else None} for kind in kinds]


@pytest.mark.parametrize('key', KEYS)
def test_image_columns_of_parquet_are_encoded_like_tags(key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    _, _, encoder = open_seeing(folders[key])
    blue, yellow = PICTURES
    both = ['a.png', 'b.png']
    for number, (row, query) in enumerate([
        ({'query': 'what?', 'image': image_cells(both[:1])[0]}, f'<img>{blue}</img>what?'),
        ({'query': 'what?', 'images': image_cells(both)}, f'<img>{blue}</img><img>{yellow}</img>what?'),
        ({'query': '<img></img>what <img></img>?', 'images': image_cells(both)},
         f'<img>{blue}</img>what <img>{yellow}</img>?'),
        ({'query': 'what?', 'image': None}, 'what?'),
    ]):  # fmt: skip
        file = parquet_of([{**row, 'response': 'blue'}], tmp_path / f'{number}.parquet')
        (found,) = get_dataset([str(file)], test_ratio=0.0).train
        (encoded,) = encoder.encode([found])
        (wanted,) = encoder.encode([ask(query)])
        assert encoded.input_ids == wanted.input_ids and encoded.trained == wanted.trained
        assert [Path(p).read_bytes() for p in encoded.images] == [Path(p).read_bytes() for p in wanted.images]

    turns = [{'role': 'user', 'content': items('text', 'image')}, {'role': 'assistant', 'content': items('text')}]
    file = parquet_of([{'messages': turns, 'images': image_cells(both[:1])}], tmp_path / 'turns.parquet')
    (found,) = get_dataset([str(file)], test_ratio=0.0).train
    (encoded,) = encoder.encode([found])
    (wanted,) = encoder.encode([ask(f'name a colour<img>{blue}</img>', 'name a colour')])
    assert encoded.input_ids == wanted.input_ids


def test_image_cells_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    shutil.copy(PICTURES[0], tmp_path / 'a.png')
    bad = [{'path': str(tmp_path / 'a.png')}, {'path': 'a</img>.png'}, {'bytes': 'text'}, {'path': ''}]
    rows = [{'query': 'what?', 'response': 'blue', 'image': cell} for cell in ({'path': 'a.png'}, *bad)]
    found = get_dataset([str(write_jsonl(tmp_path / 'rows.jsonl', rows))], test_ratio=0.0)
    assert [row.images for row in found.train] == [['a.png']]
    assert found.left_out.counts == {
        'the path of an image is absolute or contains an image tag (<img>)': 2,
        'an image has neither bytes nor a path': 2,
    }


def test_an_image_column_is_not_used_by_a_model_that_sees_none(tokenizer: Any, tmp_path: Path) -> None:
    encoder = make_encoder(tokenizer, template_type='auto', system=None, system_typed=False, max_length=-1)
    cell = image_cells(['a.png'])[0]
    rows = [{'query': 'what?', 'response': 'blue', 'image': cell},
            {'query': '<img></img>what?', 'response': 'blue', 'image': cell}]  # fmt: skip
    plain, tagged = get_dataset([str(parquet_of(rows, tmp_path / 'a.parquet'))], test_ratio=0.0).train
    (encoded,) = encoder.encode([plain])
    assert encoded.input_ids == encoder.encode([ask('what?')])[0].input_ids
    assert encoded.notes == ['column `image` is not used: images are not supported for this model']
    assert encoded.images == ()
    with pytest.raises(RowRefused, match='the row has images, but images are not supported for this model'):
        encoder.encode([tagged])


def test_rows_with_an_image_column_have_the_same_hash_after_the_cache_is_emptied(tmp_path: Path) -> None:
    rows = [{'query': 'what?', 'response': 'blue', 'image': image_cells([name])[0]} for name in ('a.png', 'b.png')]
    file = parquet_of(rows, tmp_path / 'a.parquet')
    first = plan_rows([str(file)]).digest
    shutil.rmtree(Path(os.environ['ASSAY_CACHE']) / 'images')
    assert plan_rows([str(file)]).digest == first
    assert len(list((Path(os.environ['ASSAY_CACHE']) / 'images' / 'bytes').iterdir())) == 2


# Training and answering through the programs


def train(folder: Path, rows_file: Path, out: Path, *flags: str, expect: int = 0) -> Path:
    """Train in this process with small settings. Returns the last checkpoint."""
    words = [*small_flags(folder, rows_file, out), '--save_total_limit', '1', *flags]
    assert llm_sft.main(words) == expect
    if expect:
        return out
    run = max(out.glob('*/v*'), key=lambda p: p.stat().st_mtime)
    return max(run.glob('checkpoint-*'), key=lambda p: int(p.name.split('-')[1]))


def losses(checkpoint: Path) -> list[float]:
    return [e['eval_loss'] for e in read_json(checkpoint / 'trainer_state.json')['log_history'] if 'eval_loss' in e]


@pytest.mark.slow
@pytest.mark.parametrize('key', [QWEN_VL, QWEN3_VL])
def test_an_image_column_is_trained_on_and_answered(key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {'query': f'name a colour {i}', 'response': NAMES[name], 'image': image_cells([name])[0]}
        for i in range(10)
        for name in NAMES
    ]
    file = parquet_of(rows, tmp_path / 'rows.parquet')
    checkpoint = train(folders[key], file, tmp_path / 'out', '--max_steps', '2', '--eval_steps', '2')
    report = read_json(checkpoint.parent / 'run.json')['data']
    assert report['left_out'] == {} and report['noted'] == {}
    answers = tmp_path / 'answers.jsonl'
    words = ['--ckpt_dir', str(checkpoint), '--result_path', str(answers), '--max_new_tokens', '2']
    assert llm_infer.main(words) == 0
    images = [json.loads(line)['images'] for line in answers.read_text().splitlines()]
    assert len(images) == 2 and all(len(paths) == 1 and Path(paths[0]).is_file() for paths in images)


@pytest.mark.slow
def test_an_image_column_is_named_as_not_used_by_a_run_that_sees_none(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{'query': f'q {i}', 'response': 'r', 'image': image_cells(['a.png'])[0]} for i in range(20)]
    train(model_dir, parquet_of(rows, tmp_path / 'rows.parquet'), tmp_path / 'out', '--max_steps', '2')
    assert '20 rows noted: column `image` is not used: images are not supported for this model (' in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize('key', KEYS)
def test_lora_learns_what_pictures_show_and_answers_by_them(key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    rows_file = picture_rows(tmp_path / 'data')
    flags = [
        '--max_steps', '80', '--eval_steps', '80', '--learning_rate', '0.005' if key == QWEN_VL else '0.02',
        '--batch_size', '5', '--gradient_accumulation_steps', '1', '--lora_target_modules', 'ALL',
        '--dataloader_num_workers', '1', '--dataset_test_ratio', '0',
    ]  # fmt: skip
    checkpoint = train(folders[key], rows_file, tmp_path / 'out', *flags)
    names = load_file(checkpoint / 'adapter_model.safetensors')
    assert names and not [name for name in names if 'visual' in name]
    assert set(read_json(checkpoint / 'adapter_config.json')['target_modules']) == {
        'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj',
    }  # fmt: skip

    answers = [
        '--do_sample',
        'false',
        '--max_new_tokens',
        '8',
        '--dataset_test_ratio',
        '0.9',
        '--dataset',
        str(rows_file),
    ]
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), *answers]) == 0
    results = [json.loads(line) for line in (checkpoint / 'infer_result.jsonl').read_text().splitlines()]
    assert len(results) == 9
    colours = [r for r in results if r['label'] in NAMES.values()]
    assert len(colours) >= 5
    # The head of the toy Qwen-VL was widened for the end of a reply. It is frozen, so that token has no probability.
    answers_of = [r['answer'][: len(r['label'])] if key == QWEN_VL else r['answer'] for r in colours]
    assert answers_of == [r['label'] for r in colours]

    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    merged = Path(f'{checkpoint}-merged')
    assert read_json(merged / 'config.json')['model_type'] == (
        'assay_qwen_vl' if key == QWEN_VL else read_json(folders[key] / 'config.json')['model_type']
    )
    assert type(load_model(merged, torch_dtype=torch.float32)) is type(open_seeing(folders[key])[0])
    if key != QWEN_VL:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        assert len(AutoTokenizer.from_pretrained(merged)) == len(load_tokenizer(folders[key]))
        assert type(AutoModelForImageTextToText.from_pretrained(merged)) is type(open_seeing(folders[key])[0])
        assert AutoImageProcessor.from_pretrained(merged, backend='pil').size == make_image_processor().size
    assert llm_infer.main(['--ckpt_dir', str(merged), *answers]) == 0
    again = [json.loads(line) for line in (merged / 'infer_result.jsonl').read_text().splitlines()]
    assert [r['answer'] for r in again] == [r['answer'] for r in results]


@pytest.mark.slow
@pytest.mark.parametrize('key', KEYS)
def test_full_training_leaves_the_tower_unless_told_otherwise(
    key: str, folders: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base = {name: tensor.clone() for name, tensor in open_seeing(folders[key])[0].state_dict().items()}
    for frozen in ('true', 'false'):
        flags = ['--sft_type', 'full', '--max_steps', '3', '--eval_steps', '3', '--freeze_vision', frozen]
        checkpoint = train(folders[key], rows_file, tmp_path / frozen, *flags)
        trained = load_model(checkpoint, torch_dtype=torch.float32).state_dict()
        moved = {name for name, tensor in base.items() if not torch.equal(tensor, trained[name])}
        assert [name for name in moved if 'visual' not in name]
        assert bool([name for name in moved if 'visual' in name]) is (frozen == 'false')
        again = ['--ckpt_dir', str(checkpoint), '--max_new_tokens', '2', '--dataset_test_ratio', '0.5']
        assert llm_infer.main([*again, '--dataset', str(rows_file)]) == 0
        assert len((checkpoint / 'infer_result.jsonl').read_text().splitlines()) == 5


@pytest.mark.slow
@pytest.mark.parametrize('key', [QWEN25_VL, QWEN3_VL])
def test_gradients_reach_the_language_model_alone_or_the_tower_too(
    key: str, folders: dict[str, Path], rows_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from utils.cli.arguments import SftArguments

    rows = get_dataset([str(rows_file)], test_ratio=0).train
    for frozen, wanted in ((True, ['ALL']), (True, ['q_proj']), (False, ['ALL']), (False, ['q_proj'])):
        model, tokenizer, encoder = open_seeing(folders[key])
        encoded, _ = encode_rows(encoder, rows, EncodingReport())
        batch = Collator(tokenizer.pad_token_id, encoder.images)([encoded[i] for i in range(len(encoded))])
        batch.pop('prompt_lengths')
        torch.manual_seed(0)
        prepared = prepare_model(model, SftArguments(lora_target_modules=wanted, freeze_vision=frozen)).train()
        prepared(**batch).loss.backward()
        trained = {n: p.grad.clone() for n, p in prepared.named_parameters() if p.requires_grad and 'lora_B' in n}
        prepared.zero_grad()
        prepared.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
        prepared(**batch).loss.backward()
        again = {n: p.grad for n, p in prepared.named_parameters() if n in trained}
        assert all((again[name] - grad).abs().max() <= 1e-5 for name, grad in trained.items())
        seeing = {name: grad for name, grad in trained.items() if '.visual.' in name}
        assert all(grad.abs().max() > 0 for grad in trained.values())
        assert len(trained) - len(seeing) == (14 if wanted == ['ALL'] else 2)
        assert bool(seeing) is (not frozen and wanted == ['ALL'])
        said = '--lora_target_modules names no layer in model.visual. Add one or more' in caplog.text
        assert said is (not frozen and wanted == ['q_proj'])


@pytest.mark.slow
def test_layers_of_the_tower_are_named_where_they_are_frozen(
    folders: dict[str, Path], rows_file: Path, tmp_path: Path, problems: Any
) -> None:
    flags = ['--lora_target_modules', 'in_proj', 'c_proj', '--max_steps', '1']
    train(folders[QWEN_VL], rows_file, tmp_path / 'out', *flags, expect=2)
    assert len(problems()) == 1 and problems()[0].startswith("--lora_target_modules 'in_proj' matches no linear layer")
    assert problems()[0].endswith('It belongs to the vision tower: add --freeze_vision false.')
    checkpoint = train(folders[QWEN_VL], rows_file, tmp_path / 'out', *flags, '--freeze_vision', 'false')
    names = {name.split('.lora_')[0].rsplit('.', 1)[1] for name in load_file(checkpoint / 'adapter_model.safetensors')}
    assert names == {'in_proj', 'c_proj', 'o_proj', 'down_proj'}
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0


@pytest.mark.parametrize('key', KEYS)
def test_a_batch_answers_as_its_rows_do_alone(key: str, folders: dict[str, Path], rows_file: Path) -> None:
    from transformers import GenerationConfig

    model, _, encoder = open_seeing(folders[key])
    rows = get_dataset([str(rows_file)], test_ratio=0).train
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=[2], pad_token_id=5)
    prompts, paths = encoder.encode_prompts(rows), [encoder.image_paths(row) for row in rows]
    assert sorted(map(len, paths)) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    alone = [
        generate_rows(model, [p], config, batch_size=1, images=encoder.images, paths=[seen])[0]
        for p, seen in zip(prompts, paths, strict=True)
    ]
    together = generate_rows(model, prompts, config, batch_size=4, images=encoder.images, paths=paths)
    assert together == alone
    encoded, _ = encode_rows(encoder, rows, EncodingReport())
    collate = Collator(5, encoder.images)
    batches = [collate([encoded[i]]) for i in range(len(rows))] + [collate([encoded[i] for i in range(len(rows))])]
    with torch.no_grad():
        logits = [model(**{k: v for k, v in b.items() if k != 'prompt_lengths'}).logits for b in batches]
    for index, single in enumerate(logits[:-1]):
        assert (logits[-1][index, : single.shape[1]] - single[0]).abs().max() < 1e-4
    shown = [row.messages[-2]['content'].replace('b.png', 'a.png') for row in rows[:8]]
    assert shown[:4] == shown[4:]
    assert alone[:4] != alone[4:8], 'what the pictures show matters'


@pytest.mark.slow
@pytest.mark.optional
@pytest.mark.parametrize('key', KEYS)
@pytest.mark.parametrize('bits', [4, 8])
def test_bitsandbytes_leaves_the_tower_and_the_head_alone(
    key: str, bits: int, folders: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    info = get_model_info(key, str(folders[key]))
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    options = LoadOptions(torch_dtype=torch.float32, quantization_config=settings)
    model, _ = get_model_tokenizer(info, locate(info, revision='master'), options)
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kinds['.layers.' in name and 'visual' not in name].add(type(module).__name__)
    assert kinds == {True: {'Linear4bit' if bits == 4 else 'Linear8bitLt'}, False: {'Linear'}}
    flags = ['--quantization_bit', str(bits), '--max_steps', '5', '--eval_steps', '2', '--save_steps', '5']
    checkpoint = train(folders[key], rows_file, tmp_path / 'out', *flags)
    history = read_json(checkpoint / 'trainer_state.json')['log_history']
    assert all(entry['grad_norm'] > 0 for entry in history if 'grad_norm' in entry)
    found = losses(checkpoint)
    assert found[-1] < found[0]


@pytest.mark.slow
def test_evaluation_by_generation_sees_the_pictures(folders: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    for key in (QWEN_VL, QWEN25_VL):
        flags = [
            '--predict_with_generate', 'true', '--max_new_tokens', '4', '--do_sample', 'false', '--max_steps', '2',
            '--eval_batch_size', '3', '--dataset_test_ratio', '0.5', '--eval_steps', '2',
        ]  # fmt: skip
        checkpoint = train(folders[key], rows_file, tmp_path / key, *flags)
        history = read_json(checkpoint / 'trainer_state.json')['log_history']
        scores = [entry['eval_rouge-l'] for entry in history if 'eval_rouge-l' in entry]
        assert len(scores) == 1
        answers = ['--do_sample', 'false', '--infer_batch_size', '2', '--ckpt_dir', str(checkpoint)]
        assert llm_infer.main(answers) == 0
        results = [json.loads(line) for line in (checkpoint / 'infer_result.jsonl').read_text().splitlines()]
        mean = sum(result['scores']['rouge-l'] for result in results) / len(results)
        assert scores[0] == pytest.approx(mean, abs=1e-3)


@pytest.mark.slow
def test_pictures_are_shown_in_the_chat(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / 'cut.png').write_bytes(Path(PICTURES[0]).read_bytes()[:3000])
    for key in (QWEN_VL, QWEN25_VL):
        lines = iter([
            f'<img>{PICTURES[0]}</img>name a colour', f'and <img>{PICTURES[1]}</img>?', '<img>gone.png</img>what?',
            f'<img>{tmp_path}/cut.png</img>what?', '/clear', 'no picture', '/exit',
        ])  # fmt: skip
        monkeypatch.setattr('builtins.input', lambda prompt, lines=lines: next(lines))
        flags = ['--eval_human', 'true', '--max_new_tokens', '3', '--do_sample', 'false', '--dtype', 'fp32']
        assert llm_infer.main(['--model_id_or_path', str(folders[key]), *flags]) == 0
        shown = capsys.readouterr().out
        assert '<img>path</img> in a line shows an image' in shown
        assert '(an image does not exist or is not a file [gone.png])' in shown
        assert f"(image '{tmp_path}/cut.png' cannot be read" in shown
        assert shown.count('(') == 4


@pytest.mark.slow
def test_a_folder_that_is_not_registered_sees_too(folders: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'my-own-vl'
    shutil.copytree(folders[QWEN3_VL], folder)
    template = read_json(folder / 'tokenizer_config.json').get('chat_template')
    template = template or (folder / 'chat_template.jinja').read_text(encoding='utf-8')
    (folder / 'chat_template.jinja').unlink(missing_ok=True)
    (folder / 'chat_template.json').write_text(json.dumps({'chat_template': template}), encoding='utf-8')
    settings = read_json(folder / 'preprocessor_config.json')
    (folder / 'trap.py').write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n", encoding='utf-8')
    settings['auto_map'] = dict.fromkeys(('AutoImageProcessor', 'AutoProcessor'), 'trap.Trap')
    (folder / 'preprocessor_config.json').write_text(json.dumps(settings), encoding='utf-8')
    checkpoint = train(folder, rows_file, tmp_path / 'out', '--max_steps', '2', '--eval_steps', '1')
    assert not (tmp_path / 'sprung').exists()
    assert read_json(checkpoint / 'sft_args.json')['model_type'] is None
    assert set(read_json(checkpoint / 'adapter_config.json')['target_modules']) == {
        'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj',
    }  # fmt: skip
    assert len(losses(checkpoint)) == 2
    (folder / 'preprocessor_config.json').unlink()
    train(folder, rows_file, tmp_path / 'gone', '--max_steps', '2', expect=2)


@pytest.mark.slow
def test_an_exported_qwen_vl_sees_and_is_no_plain_model(
    folders: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    target = tmp_path / 'native'
    words = ['--model_id_or_path', str(folders[QWEN_VL]), '--dtype', 'fp32']
    assert llm_infer.main([*words, '--export_native', 'true', '--output_dir', str(target)]) == 0
    config = read_json(target / 'config.json')
    assert config['model_type'] == 'assay_qwen_vl' and 'auto_map' not in config
    with pytest.raises(ValueError, match='assay_qwen_vl'):
        AutoModelForCausalLM.from_pretrained(target)
    answers = []
    for folder in (folders[QWEN_VL], target):
        flags = [
            '--dataset',
            str(rows_file),
            '--dataset_test_ratio',
            '0.5',
            '--do_sample',
            'false',
            '--max_new_tokens',
            '4',
        ]
        out = tmp_path / f'{folder.name}.jsonl'
        words = [
            '--model_id_or_path',
            str(folder),
            '--template_type',
            'chatml',
            '--dtype',
            'fp32',
            '--result_path',
            str(out),
        ]
        assert llm_infer.main([*words, *flags]) == 0
        answers.append([json.loads(line)['answer'] for line in out.read_text().splitlines()])
    assert len(answers[0]) == 5 and answers[0] == answers[1]


def test_entries_of_models_that_see() -> None:
    keys = [key for key in MODEL_MAPPING if '-vl' in key]
    assert len(keys) == 3 + 4 + 4
    modern = [MODEL_MAPPING[key] for key in keys if not key.startswith('qwen-vl')]
    assert {info.requires for info in modern} == {('transformers>=4.49',), ('transformers>=4.57',)}
    assert {info.template for info in modern} == {'auto'}


def test_towers_are_what_is_not_the_language_model(folders: dict[str, Path]) -> None:
    towers = {key: find_towers(open_seeing(folders[key])[0]) for key in KEYS}
    assert towers == {QWEN_VL: ['visual'], QWEN25_VL: ['model.visual'], QWEN3_VL: ['model.visual']}
    assert make_seeing_model(QWEN25_VL, make_seeing_tokenizer(QWEN25_VL)).config.model_type == 'qwen2_5_vl'
