"""What the quick start shows at its end: held-out questions before and after, and where to go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from utils.base.logger import replace_unprintable
from utils.formats.demo_sql import is_right


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def _is_right(row: dict[str, Any]) -> bool:
    return is_right({'query': row['messages'][-1]['content'], 'response': row['label']}, row['answer'])


def _one_line(text: str) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= 96 else line[:93] + '...'


def table(before: list[bool], after: list[bool]) -> str:
    """Return the share of held-out questions that each model answered with the right SQL."""
    lines = [f'{"held-out questions":<24}{"right":>12}{"per cent":>12}']
    for name, right in (('base model', before), ('fine-tuned', after)):
        lines.append(f'{name:<24}{f"{sum(right)} of {len(right)}":>12}{100 * sum(right) / len(right):>11.1f}%')
    return '\n'.join(lines)


def examples(before: list[dict[str, Any]], after: list[dict[str, Any]], right: list[bool]) -> str:
    """Return questions with the wanted answer and both models': two got right and one got wrong, where there is one."""
    wrong = [i for i, ok in enumerate(right) if not ok]
    chosen = [i for i, ok in enumerate(right) if ok][: 3 - bool(wrong)] + wrong[:1]
    blocks = []
    for i in chosen:
        definition, question = before[i]['messages'][-1]['content'].split('\n')
        blocks.append(
            f'{question}\n  {definition}\n  wanted  {after[i]["label"]}\n  base    {_one_line(before[i]["answer"])}\n'
            f'  tuned   {_one_line(after[i]["answer"])}   <- {"right" if right[i] else "wrong"}'
        )
    return '\n\n'.join(blocks)


def main(folder: Path) -> int:
    """Print the comparison of a quick-start folder; returns the exit code."""
    before, after = _read(folder / 'before.jsonl'), _read(folder / 'after.jsonl')
    right_before, right_after = [_is_right(r) for r in before], [_is_right(r) for r in after]
    run = next(folder.glob('*/v0-*/run.json'))
    record = json.loads(run.read_text(encoding='utf-8'))
    print(table(right_before, right_after))
    print('An answer is right when its SQL, run on SQLite, gives what the reference gives. Tables, columns, values and')
    print('sentences of these questions never occur in the training rows.\n')
    print(examples(before, after, right_after) + '\n')
    print(
        f'training   {record["steps"]} steps in {record["seconds"]:.0f} s, '
        f'{record["train_tokens_per_second"]:.0f} tokens/s, peak memory {record["peak_memory_gib"]} GiB'
    )
    print(f'curves     {run.parent / "images"}')
    print(f'checkpoint {record["best_checkpoint"]}')
    print(f'chat       .venv/bin/python llm_infer.py --ckpt_dir {record["best_checkpoint"]} --eval_human true')
    print(f'again      rm -r {folder}; bash scripts/quickstart.sh')
    return 0


if __name__ == '__main__':
    replace_unprintable()
    sys.exit(main(Path(sys.argv[1])))
