"""Prints the summary at the end of the quick start.

It compares the answers to held-out questions before and after training, and shows the commands to run next.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from utils.base.logger import replace_unprintable


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def _one_line(text: str) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= 96 else line[:93] + '...'


def table(before: list[bool], after: list[bool]) -> str:
    """Return a text table that shows how many held-out questions each model answered with the right SQL.

    `before` and `after` say for each question whether the base model and the fine-tuned model were right.
    """
    lines = [f'{"held-out questions":<24}{"right":>12}{"per cent":>12}']
    for name, right in (('base model', before), ('fine-tuned', after)):
        lines.append(f'{name:<24}{f"{sum(right)} of {len(right)}":>12}{100 * sum(right) / len(right):>11.1f}%')
    return '\n'.join(lines)


def examples(before: list[dict[str, Any]], after: list[dict[str, Any]], right: list[bool]) -> str:
    """Return a text with up to three questions, each with the reference answer and the answers of both models.

    `right` says for each question whether the tuned model was right. If it was wrong for a question, the last of the
    three questions is the first such question. The others are the first questions that the tuned model answered right.
    """
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
    """Print the summary of a quick-start folder. Returns the exit code 0.

    The folder has before.jsonl and after.jsonl (the answers of the two models), and the run.json of the training.
    """
    before = _read(folder / 'before.jsonl')
    after = _read(folder / 'after.jsonl')
    right_before = [row['scores']['right'] == 1 for row in before]
    right_after = [row['scores']['right'] == 1 for row in after]
    run = next(folder.glob('*/v0-*/run.json'))
    outcome = json.loads(run.read_text(encoding='utf-8'))

    print(table(right_before, right_after))
    print('An answer is right if its SQL returns the same as the reference on SQLite. The tables, columns, values and')
    print('sentences of these questions do not occur in the training rows.\n')
    print(examples(before, after, right_after) + '\n')
    print(
        f'training   {outcome["steps"]} steps in {outcome["seconds"]:.0f} s, '
        f'{outcome["train_tokens_per_second"]:.0f} tokens/s, peak memory {outcome["peak_memory_gib"]} GiB'
    )
    print(f'curves     {run.parent / "images"}')
    print(f'checkpoint {outcome["best_checkpoint"]}')
    print(f'chat       .venv/bin/python llm_infer.py --ckpt_dir {outcome["best_checkpoint"]} --eval_human true')
    print(f'again      rm -r {folder}; bash scripts/quickstart.sh')
    return 0


if __name__ == '__main__':
    replace_unprintable()
    sys.exit(main(Path(sys.argv[1])))
