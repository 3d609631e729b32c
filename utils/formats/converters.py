"""What a registered data set is: where it lies, which files of it are read, and how a row of it becomes ours.

Converters are pure: a row of the source in, a row of ours or None (dropped) out; nothing of a row is ever executed.
"""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import random
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.cache import cache_dir
from utils.base.errors import ConfigError
from utils.formats.columns import BadRow, Filtered
from utils.formats.data_file import SUFFIXES, read_objects, read_rows
from utils.formats.images import BadImage, place_image
from utils.hub import snapshot as hub
from utils.hub.clients import HubName, Repo

SourceRow = Mapping[str, Any]
PlainRow = dict[str, Any]
# A converter returns None for a row that is broken, and raises Unwanted for one that it leaves out by choice.
ToRow = Callable[[SourceRow], PlainRow | None]


class Unwanted(Exception):
    """A row that is whole, and that the entry of its data set leaves out by choice."""


def _text(row: SourceRow, column: str) -> str:
    """Return a cell as text, '' where it is missing (null, NaN, no such column)."""
    value = row.get(column)
    return '' if value is None or value != value else str(value)


def _literal(value: Any) -> list[Any] | None:
    """Return the list that a cell holds, as such or written as a Python literal; None where it is none."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


def pair(query: str, response: str, *, query_may_be_empty: bool = False) -> ToRow:
    """Return a converter: two columns as they are; a row that misses either is dropped."""

    def to_row(row: SourceRow) -> PlainRow | None:
        asked, answered = _text(row, query), _text(row, response)
        return {'query': asked, 'response': answered} if answered and (asked or query_may_be_empty) else None

    return to_row


def alpaca(
    instruction: str = 'instruction', extra: str = 'input', output: str = 'output', *, drop_prefix: str = ''
) -> ToRow:
    """Return a converter: query = instruction, newline, input; the input alone where there is no instruction.

    `drop_prefix` is what some inputs begin with.
    """

    def to_row(row: SourceRow) -> PlainRow | None:
        query, response = _text(row, instruction), _text(row, output)
        added = _text(row, extra).removeprefix(drop_prefix)
        asked = f'{query}\n{added}' if query else added
        return {'query': asked, 'response': response} if response and asked else None

    return to_row


def of_kinds(column: str, kinds: Iterable[str], to_row: ToRow) -> ToRow:
    """Return a converter that drops rows of any other kind."""
    kept = frozenset(kinds)

    def of_kind(row: SourceRow) -> PlainRow | None:
        if row.get(column) in kept:
            return to_row(row)
        if not _text(row, column):
            return None
        raise Unwanted

    return of_kind


def without_history(column: str, to_row: ToRow) -> ToRow:
    """Return a converter that leaves out rows with a history; one that cannot be read is broken."""

    def without(row: SourceRow) -> PlainRow | None:
        history = [] if row.get(column) in (None, '') else _literal(row[column])
        if history is None:
            return None
        if history:
            raise Unwanted
        return to_row(row)

    return without


def with_answer(query: str, response: str, answer: str) -> ToRow:
    """Return a converter whose response ends with a blank line and the answer."""

    def to_row(row: SourceRow) -> PlainRow | None:
        asked, solved, result = _text(row, query), _text(row, response), _text(row, answer)
        if not asked or not solved:
            return None
        return {'query': asked, 'response': f'{solved}\n\nAnswer: {result}' if result else solved}

    return to_row


def human_assistant(column: str) -> ToRow:
    """Return a converter of a list of {human, assistant} turns: the last is asked and answered, the others history."""

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get(column))
        if not turns or not all(isinstance(t, dict) and {'human', 'assistant'} <= t.keys() for t in turns):
            return None
        pairs = [[_text(turn, 'human'), _text(turn, 'assistant')] for turn in turns]
        (query, response), history = pairs[-1], pairs[:-1]
        return {'query': query, 'response': response, 'history': history} if response else None

    return to_row


def agent(plugin: str) -> ToRow:
    """Return a converter of {from, value} turns after a system turn that lists at least two plugins.

    `plugin` finds a plugin's name in the system text. Rows whose turns do not alternate user, assistant are left out.
    """
    pattern = re.compile(plugin)

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get('conversations'))
        if not turns or not all(isinstance(t, dict) and {'from', 'value'} <= t.keys() for t in turns):
            return None
        system, *said = turns
        texts = [_text(turn, 'value') for turn in said]
        if not texts or not texts[-1]:
            return None
        if len(set(pattern.findall(_text(system, 'value')))) < 2:
            raise Unwanted
        if [turn['from'] for turn in said] != ['user', 'assistant'] * (len(said) // 2):
            raise Unwanted
        history = [list(texts[i : i + 2]) for i in range(0, len(texts) - 2, 2)]
        return {'system': _text(system, 'value'), 'query': texts[-2], 'response': texts[-1], 'history': history}

    return to_row


def two_rounds(column: str) -> ToRow:
    """Return a converter of exactly two turns with `content`: what is asked, what is answered."""

    def to_row(row: SourceRow) -> PlainRow | None:
        turns = _literal(row.get(column))
        if turns is None or not all(isinstance(turn, dict) for turn in turns):
            return None
        if len(turns) != 2:
            raise Unwanted
        query, response = (_text(turn, 'content') for turn in turns)
        return {'query': query, 'response': response} if query and response else None

    return to_row


def leetcode(row: SourceRow) -> PlainRow | None:
    """Return the problem, and its one code block with the explanation."""
    problem, mark, code = _text(row, 'code_with_problem').partition('```python')
    if not mark or '```python' in code:
        if not _text(row, 'code_with_problem'):
            return None
        raise Unwanted
    response = f'{mark}{code.rstrip()}\n\n{_text(row, "explanation_only")}'.rstrip()
    return {'query': problem.strip().removeprefix('# '), 'response': response}


def law_text(row: SourceRow) -> PlainRow | None:
    """Return a text to continue, as in pre-training: no query, the article with its headings as the response."""
    if not _text(row, 'content'):
        return None
    heads = {'Type': 'type', 'Title': 'title', **{f'Chapter{n}': f'chapter{n}' for n in (1, 2, 3)}}
    lines = [
        f'{head}: {_text(row, column)}'
        for head, column in heads.items()
        if not head.startswith('Chapter') or _text(row, column)
    ]
    return {'query': '', 'response': '\n'.join([*lines, f'Content: {_text(row, "content")}'])}


def advertise(row: SourceRow) -> PlainRow | None:
    """Return the task of writing an advertisement from keywords."""
    keywords, text = _text(row, 'content'), _text(row, 'summary')
    if not keywords or not text:
        return None
    return {'query': f'任务：根据关键词生成广告\n关键词：{keywords}\n广告：', 'response': text}


def ask_question(row: SourceRow) -> PlainRow | None:
    """Return the task of asking the question that a text answers; text1 is '<answer>[SEP]<context>'."""
    answer, mark, context = _text(row, 'text1').partition('[SEP]')
    question = _text(row, 'text2')
    if not mark or not question:
        return None
    return {'query': f'任务：问题生成\n上下文：{context}\n答案：{answer}\n问题：', 'response': question}


def classify(task: str, columns: Mapping[str, str], names: Sequence[str]) -> ToRow:
    """Return a converter to a task of naming the category; `columns` maps column to its heading in the prompt."""

    def to_row(row: SourceRow) -> PlainRow | None:
        label = row.get('label')
        try:
            index = names.index(label) if label in names else int(float(_text(row, 'label')))
        except (ValueError, OverflowError):
            return None
        if index == -1:  # stands for a hidden label
            raise Unwanted
        if not 0 <= index < len(names):
            return None
        said = ''.join(f'{heading}：{_text(row, column)}\n' for column, heading in columns.items())
        return {'query': f'任务：{task}\n{said}类别：{"，".join(names)}\n输出：', 'response': names[index]}

    return to_row


def always_ask(query: str, response: str) -> ToRow:
    """Return a converter that asks the same of every row."""
    return lambda row: {'query': query, 'response': _text(row, response)} if _text(row, response) else None


def caption(row: SourceRow) -> PlainRow | None:
    """Return the task of describing an image, named by its path; of several captions the first."""
    image = row.get('image')
    path = image.get('path') if isinstance(image, Mapping) else image
    text = _text(row, 'caption').partition('&&')[0].strip()
    return {'query': f'<img>{path}</img>Please describe the image.', 'response': text} if path and text else None


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """One data set on the hubs: data, and a callable without arguments that returns (train, validation or None)."""

    # ModelScope: the id of 2023, and where it moved.
    id: str
    moved: tuple[str, ...] = ()
    # The same data on Hugging Face.
    hf_id: str | None = None
    # Columns that must be there.
    columns: tuple[str, ...]
    to_row: ToRow
    # Why to_row drops a row, in words.
    drops: str
    subsets: tuple[str, ...] = ('default',)
    # Words in the names of files that are of other subsets.
    not_named: tuple[str, ...] = ()
    train: tuple[str, ...] = ('train',)
    val: tuple[str, ...] = ()
    # The files hold JSON objects one after the other, with or without anything between them.
    concatenated: bool = False
    # Column of an image: rows get the path of a file.
    image: str | None = None
    # Training rows drawn once and for all, with the seed 42.
    take: int | None = None

    def repos(self, hub_name: HubName) -> list[Repo]:
        """Return the places where it may lie, those on the chosen hub first."""
        ids: dict[HubName, Sequence[str]] = {
            'modelscope': (self.id, *self.moved),
            'huggingface': (self.hf_id,) if self.hf_id else (),
        }
        return hub.repos_of(hub_name, ids)

    def load(self, hub_name: HubName) -> tuple[RowStream, RowStream | None, str]:
        """Return (train, validation or None, where it came from); fetches only the files that are read."""
        snapshot = hub.find(self.repos(hub_name), 'dataset')
        chosen = choose_files(snapshot, self)
        folder = snapshot.fetch([name for names in chosen.values() for name in names])

        def stream(splits: Sequence[str], take: int | None = None) -> RowStream:
            files = tuple(folder / name for split in splits for name in chosen[split])
            return RowStream(entry=self, files=files, take=take)

        return stream(self.train, self.take), stream(self.val) if self.val else None, str(snapshot.repo)

    def __call__(self) -> tuple[RowStream, RowStream | None]:
        """Return (train, validation or None) from the default hub."""
        train, val, _ = self.load('modelscope')
        return train, val


@dataclass(frozen=True, kw_only=True)
class RowStream:
    """The rows of some files, read anew at each iteration and never held together."""

    entry: HubDataset
    files: tuple[Path, ...]
    take: int | None = None

    def __iter__(self) -> Iterator[PlainRow]:
        return (row for _, row in self.placed() if not isinstance(row, BadRow))

    def placed(self) -> Iterator[tuple[str, PlainRow | BadRow]]:
        """Yield each row with file and line, or why it is dropped."""
        if self.take is None:
            yield from self._all()
            return
        count = sum(not isinstance(row, BadRow) for _, row in self._all())
        drawn = set(random.Random(42).sample(range(count), min(self.take, count)))
        position = 0
        for place, row in self._all():
            if isinstance(row, BadRow):
                yield place, row
                continue
            if position in drawn:
                yield place, row
            position += 1

    def _all(self) -> Iterator[tuple[str, PlainRow | BadRow]]:
        archives = [file for file in self.files if file.suffix == '.zip']
        for file in self.files:
            if file in archives:
                continue
            base = _unpack_images(archives[0]) if archives else file.parent
            checked = False
            for place, raw in (read_objects if self.entry.concatenated else read_rows)(file):
                try:
                    row = _image_by_path(raw, self.entry.image, base) if self.entry.image else raw
                except BadRow as problem:
                    yield place, problem
                    continue
                if not checked and (absent := [c for c in self.entry.columns if c not in row]):
                    raise ConfigError(
                        f'{place}: the columns are {", ".join(row)}; {", ".join(absent)} is missing, expected are '
                        f'{", ".join(self.entry.columns)}. The data set changed on the hub: adapt its entry in '
                        'DATASET_MAPPING in utils/dataset.py.'
                    )
                checked = True
                yield place, self._made(row)

    def _made(self, row: SourceRow) -> PlainRow | BadRow:
        """Return a row as its entry makes it, or why it is dropped."""
        try:
            return self.entry.to_row(row) or BadRow(self.entry.drops)
        except Unwanted:
            return Filtered(self.entry.drops)


_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp')
# Pictures hardly shrink: an archive that grows more than this is no archive of pictures.
_UNPACKED_TIMES = 50


def _unpack_images(archive: Path) -> Path:
    """Return the folder with the pictures of an archive, unpacked once per machine."""
    import zipfile

    about = archive.stat()
    digest = hashlib.sha256(f'{archive.resolve()} {about.st_size} {about.st_mtime_ns}'.encode()).hexdigest()[:24]
    target = cache_dir() / 'images' / digest
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened, tempfile.TemporaryDirectory(dir=target.parent) as aside:
            pictures = [i for i in opened.infolist() if i.filename.lower().endswith(_IMAGES)]
            if sum(i.file_size for i in pictures) > max(about.st_size, 1 << 20) * _UNPACKED_TIMES:
                raise ConfigError(
                    f'{archive}: unpacked it would be over {_UNPACKED_TIMES} times its size, as no '
                    'archive of pictures is. Not opened: unpack it by hand if it is meant.'
                )
            opened.extractall(Path(aside) / 'whole', pictures)
            with contextlib.suppress(FileExistsError):  # another process may have been first
                (Path(aside) / 'whole').rename(target)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # RuntimeError: it wants a password
        raise ConfigError(f'{archive} is no whole zip file: {error}. Remove it: it is fetched again.') from None
    return target


def _image_by_path(row: SourceRow, column: str, base: Path) -> PlainRow:
    """Return the row with its image as the path of a file; bytes of a parquet cell are written to the cache.

    Raises BadRow for a path that is not one in the folder of the data.
    """
    found = {name.removesuffix(':FILE'): value for name, value in row.items()}
    image = found.get(column)
    if isinstance(image, Mapping):
        data, path = image.get('bytes'), str(image.get('path') or '')
        if data is not None:
            suffix = Path(path).suffix.lower()
            kept = cache_dir() / 'images' / 'bytes' / (hashlib.sha256(data).hexdigest() + (suffix or '.jpg'))
            if not kept.is_file():
                kept.parent.mkdir(parents=True, exist_ok=True)
                aside = kept.with_name(f'{kept.name}.{os.getpid()}')
                aside.write_bytes(data)
                aside.replace(kept)
            return {**found, column: str(kept)}
        image = path
    if image in (None, ''):
        return {**found, column: None}
    if Path(str(image)).is_absolute() or 'img>' in str(image):
        raise BadRow('an image has an absolute path, or a tag in it', column)
    try:
        return {**found, column: place_image(str(image), str(base))}
    except BadImage as error:
        raise BadRow(f'an image {error.reason}', column) from None


_SPLITS = {'train': ('train', 'training'), 'test': ('test', 'testing')}
_VALIDATION = ('validation', 'valid', 'val', 'dev', 'eval')
_NO_DATA = ('dataset_infos.json', 'dataset_info.json', 'configuration.json', 'metadata.json')
# Of the same file in several formats the first is read.
_FORMATS = ('.parquet', '.jsonl', '.json', '.csv')


def _spellings(split: str) -> tuple[str, ...]:
    return _VALIDATION if split in _VALIDATION else _SPLITS[split]


def _holds(name: str, word: str) -> bool:
    """Return whether a path holds a word between separators: 'common-en' in 'data/common_en_70k.jsonl'."""
    return f'-{_plain(word)}-' in f'-{_plain(name)}-'


@functools.cache
def _plain(text: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def choose_files(snapshot: hub.Snapshot, entry: HubDataset) -> dict[str, list[str]]:
    """Return the files of each split. What the repository says of itself goes before the names of its files.

    That is ModelScope's <name>.json ({subset: {split: {meta: file}}}) or the `configs` of a Hugging Face README.
    Raises ConfigError naming the subsets and splits that are there where one is gone.
    """
    told = _told_files(snapshot)
    found: dict[str, list[str]] = {}
    for split in (*entry.train, *entry.val):
        for subset in entry.subsets:
            names = _from_told(told, subset, split) if told else _from_names(snapshot.files, entry, subset, split)
            if not names or not snapshot.files.keys() >= set(names):
                there = [f'{s} ({", ".join(parts)})' for s, parts in told.items()] or sorted(snapshot.files)[:20]
                raise ConfigError(
                    f"data set {snapshot.repo}: split '{split}' of subset '{subset}' is not there any more. "
                    f'What is there: {", ".join(there)}. Adapt its entry in DATASET_MAPPING in utils/dataset.py.'
                )
            found.setdefault(split, []).extend(names)
    return found


def _told_files(snapshot: hub.Snapshot) -> dict[str, dict[str, list[str]]]:
    """Return what the repository says of itself: subset -> split -> files; empty where it says nothing."""
    meta = f'{snapshot.repo.id.rsplit("/", 1)[-1]}.json'
    for name, reader in ((meta, _told_by_modelscope), ('README.md', _told_by_readme)):
        # A file of rows can have the name of the other too; that is never small.
        if name in snapshot.files and (snapshot.files[name][0] or 0) < 1 << 20:
            text = (snapshot.fetch([name]) / name).read_text(encoding='utf-8', errors='replace')
            if told := reader(text, list(snapshot.files)):
                return told
    return {}


def _told_by_modelscope(text: str, _: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    try:
        told = json.loads(text)
        return {
            subset: {
                # `file` is the archive of the pictures that the rows name.
                split: [*_as_list(about['meta']), *(_as_list(about['file']) if about.get('file') else ())]
                for split, about in splits.items()
                if about.get('meta')
            }
            for subset, splits in told.items()
        }
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}


def _told_by_readme(text: str, files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    import yaml  # type: ignore[import-untyped]

    match = re.match(r'---\s*\n(.*?)\n---\s*(?:\n|$)', text, flags=re.DOTALL)
    told: dict[str, dict[str, list[str]]] = {}
    try:
        head = yaml.safe_load(match[1]) if match else None
        for config in (head.get('configs') if isinstance(head, dict) else None) or ():
            data = config.get('data_files')
            parts = data if isinstance(data, list) and data and isinstance(data[0], dict) else [{'path': data}]
            for part in parts:
                patterns = [p for p in _as_list(part.get('path')) if isinstance(p, str)]
                names = [name for p in patterns for name in files if fnmatch.fnmatchcase(name, p)]
                told.setdefault(config.get('config_name', 'default'), {})[part.get('split', 'train')] = names
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError):  # as if it said nothing
        return {}
    return told


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _from_told(told: Mapping[str, Mapping[str, list[str]]], subset: str, split: str) -> list[str]:
    # 'default' is also what a data set without subsets is asked for.
    splits = told.get(subset) or (next(iter(told.values())) if subset == 'default' and len(told) == 1 else {})
    return next((splits[name] for name in (split, *_spellings(split)) if splits.get(name)), [])


def _from_names(files: Iterable[str], entry: HubDataset, subset: str, split: str) -> list[str]:
    data = [n for n in files if n.lower().endswith(SUFFIXES) and n.rsplit('/', 1)[-1] not in _NO_DATA]
    data = [n for n in data if not any(_holds(n, word) for word in entry.not_named)]
    if subset != 'default':
        data = [name for name in data if _holds(name, subset)]
    wanted = [name for name in data if any(_holds(name, word) for word in _spellings(split))]
    every = [word for words in (*_SPLITS.values(), _VALIDATION) for word in words]
    if not wanted and split == 'train':
        wanted = [name for name in data if not any(_holds(name, word) for word in every)]
    stems: dict[str, str] = {}
    for name in sorted(wanted, key=lambda n: next(i for i, f in enumerate((*_FORMATS, '')) if n.endswith(f))):
        stems.setdefault(name.rsplit('.', 1)[0], name)
    return sorted(stems.values())
