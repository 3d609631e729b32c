"""Generates answers to rows, scores the answers, prints them and writes them to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.cli.arguments import InferArguments
from utils.data.encode_plan import encode_rows
from utils.data.encoding_report import EncodingReport
from utils.data.plan import draw
from utils.encode.encoder import Encoder
from utils.formats.conversation import Row, asked_turns
from utils.infer.generation import generate_rows, wanted_texts
from utils.infer.scores import ByRow, Scores, means

if TYPE_CHECKING:
    from transformers import GenerationConfig


def answer_rows(
    model: Any,
    tokenizer: Any,
    encoder: Encoder,
    config: GenerationConfig,
    rows: Sequence[Row],
    *,
    args: InferArguments,
    scores: Scores,
    target: Path,
) -> dict[str, float]:
    """Answer the rows, and return the mean scores by name. Each process answers its share of the rows.

    If --show_dataset_sample is smaller than the number of rows, only that many rows are drawn and answered. Rank 0
    prints all answers and writes them to the file `target`. All other ranks return an empty dictionary. Raises
    ConfigError if every row is skipped.
    """
    chosen = draw(list(rows), args.show_dataset_sample, args.dataset_seed)
    if len(chosen) < len(rows):
        logger.info(f'{len(chosen)} of {len(rows)} rows are drawn to be answered; --show_dataset_sample -1 answers all')

    report = EncodingReport()
    _, kept = encode_rows(encoder, chosen, report)
    if not kept:
        raise ConfigError(
            f'--dataset: every validation row is skipped: {"; ".join(report.lines())}. Give other rows with --dataset.'
        )
    for line in report.lines():
        logger.warning(line)

    prompts = encoder.encode_prompts(kept)
    if texts := sum(row.is_text for row in kept):
        logger.info(f'{texts} rows are plain text, not conversations: the model continues the beginning of each text')
    paths = [encoder.image_paths(row) for row in kept]
    mine = slice(dist.rank(), None, dist.world_size())
    generated = generate_rows(
        model,
        prompts[mine],
        config,
        batch_size=args.infer_batch_size,
        images=encoder.images,
        paths=paths[mine],
        progress=lambda done: logger.info(f'answered {done} of {len(prompts[mine])} rows'),
    )
    answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in dist.gather(generated)]
    if not dist.is_main():
        return {}

    labels = wanted_texts(encoder, kept, config)
    by_row = scores.by_row(answers, labels, kept)
    prompt_texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
    _show_and_write(kept, prompt_texts, answers, labels, by_row, target=target)
    mean = means(by_row)
    logger.info(f'{len(answers)} rows: ' + ', '.join(f'{name} {value:.4g}' for name, value in mean.items()))
    logger.info(f'written to {target}')
    return mean


def _show_and_write(
    rows: Sequence[Row],
    prompts: Sequence[str],
    answers: Sequence[str],
    labels: Sequence[str],
    by_row: ByRow,
    *,
    target: Path,
) -> None:
    """Print the question, the answer and the label of each row. Write all of them and the scores to `target`.

    The question is the last turn of the user. Calls and results of tools after it are printed too, each with its mark.
    A row of plain text has no question, so its prompt is shown instead.
    """
    with target.open('w', encoding='utf-8') as stream:
        for row, beginning, answer, label, scores in zip(rows, prompts, answers, labels, by_row, strict=True):
            asked = {'text': beginning} if row.is_text else {'messages': row.messages[:-1]}
            rounded = {name: round(value, 4) for name, value in scores.items()}
            content = {'origin': row.origin, **asked, 'label': label, 'answer': answer, 'scores': rounded}
            if row.images:
                content['images'] = row.images
            stream.write(json.dumps(content, ensure_ascii=False) + '\n')

            turns = [('TEXT', beginning)] if row.is_text else asked_turns(row.messages) or [('QUERY', '')]
            shown = '\n'.join(f'[{mark}] {said}' for mark, said in turns)
            print(f'{shown}\n[LABEL] {label}\n[ANSWER] {answer}\n{"-" * 40}')
