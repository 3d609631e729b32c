"""Held-out rows that are read again by their positions: the same rows as by planning, or none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import write_jsonl
from utils.data.held_out import held_out, read_held_out
from utils.data.open_parts import read_rows_at
from utils.data.parts import VAL
from utils.data.plan import Plan, plan_rows
from utils.formats.conversation import Row
from utils.formats.row_check import check_row


def made_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{'query': f'what is {i}?', 'response': f'it is {i}.'} for i in range(first, first + count)]


def kept(plan: Plan) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(held_out(plan)))
    return content


def with_unusable_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put rows without a reply at the start, in the middle and at the end."""
    empty = {'query': 'nothing', 'response': ''}
    return [empty, empty, *rows[:7], empty, *rows[7:], empty]


def one_file(folder: Path) -> list[str]:
    return [str(write_jsonl(folder / 'a.jsonl', with_unusable_rows(made_rows(30))))]


def folder_of_files(folder: Path) -> list[str]:
    (folder / 'rows').mkdir()
    write_jsonl(folder / 'rows' / 'a.jsonl', with_unusable_rows(made_rows(30)))
    (folder / 'rows' / 'b.json').write_text(json.dumps(with_unusable_rows(made_rows(20, first=30))), encoding='utf-8')
    lines = ''.join(f'what is {i}?,it is {i}.\n' for i in range(50, 70))
    (folder / 'rows' / 'c.csv.gz').write_bytes(gzip.compress(('query,response\n' + lines).encode()))
    return [f'{folder}/rows/']


def several_sampled(folder: Path) -> list[str]:
    second = write_jsonl(folder / 'b.jsonl', made_rows(40, first=30))
    return [f'{one_file(folder)[0]}#20', str(second)]


@pytest.mark.parametrize('words_of', [one_file, folder_of_files, several_sampled])
@pytest.mark.parametrize('train_sample', [-1, 12])
def test_they_are_the_rows_that_planning_finds(words_of: Any, train_sample: int, tmp_path: Path) -> None:
    words = words_of(tmp_path)
    plan = plan_rows(words, test_ratio=0.3, train_sample=train_sample)
    wanted = [row for _, row in plan.rows(VAL)]
    assert len(wanted) >= 3
    found = read_held_out(kept(plan), words)
    assert found == wanted
    assert [row.origin for row in found] == [row.origin for row in wanted]


def test_changed_renamed_or_other_files_give_none(tmp_path: Path) -> None:
    words = several_sampled(tmp_path)
    content = kept(plan_rows(words, test_ratio=0.3))
    assert read_held_out(content, words) is not None
    assert read_held_out(content, words[:1]) is None
    assert read_held_out(content, words[::-1]) is None
    (tmp_path / 'b.jsonl').rename(tmp_path / 'c.jsonl')
    assert read_held_out(content, [words[0], str(tmp_path / 'c.jsonl')]) is None
    write_jsonl(tmp_path / 'b.jsonl', made_rows(40, first=31))
    assert read_held_out(content, words) is None
    write_jsonl(tmp_path / 'b.jsonl', made_rows(40, first=30))
    assert read_held_out(content, words) is not None


def test_another_number_of_usable_rows_gives_none(tmp_path: Path) -> None:
    words = one_file(tmp_path)
    content = kept(plan_rows(words, test_ratio=0.3))
    content[words[0]]['rows'].append(0)
    assert read_held_out(content, words) is None, 'row 0 has no reply'


def test_registered_sets_and_rows_with_images_are_planned(tmp_path: Path) -> None:
    plan = plan_rows(['sql-demo'])
    assert kept(plan)['sql-demo']['files_sha256'] is None
    assert read_held_out(kept(plan), ['sql-demo']) is None

    picture = tmp_path / 'a.png'
    picture.write_bytes(b'not read here')
    rows = [{'query': f'<image>what is {i}?', 'response': 'a picture', 'images': [str(picture)]} for i in range(4)]
    words = [str(write_jsonl(tmp_path / 'seen.jsonl', rows))]
    plan = plan_rows(words, test_ratio=0.3)
    assert kept(plan)[words[0]] == {'files_sha256': None, 'rows': held_out(plan)[words[0]]['rows']}
    assert read_held_out(kept(plan), words) is None

    rows = [{'query': f'<img>{picture}</img>what is {i}?', 'response': 'a picture'} for i in range(4)]
    words = [str(write_jsonl(tmp_path / 'tagged.jsonl', rows))]
    assert kept(plan_rows(words, test_ratio=0.3))[words[0]]['files_sha256'] is None


def test_only_wanted_rows_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = one_file(tmp_path)
    plan = plan_rows(words, test_ratio=0.1)
    content = kept(plan)
    checked: list[Row] = []

    def noted(row: Row) -> Row:
        checked.append(row)
        return check_row(row)

    monkeypatch.setattr('utils.data.converted_rows.check_row', noted)
    assert read_held_out(content, words) is not None
    assert len(checked) == len(content[words[0]]['rows']) + 1, 'and the first one, which tells the shape'
    assert read_rows_at(plan.parts[0].files, frozenset()) == []
