"""The model card (README.md) of a pushed model. It is made from the record of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from utils.cli.arguments import SftArguments, to_dict
from utils.run.curves import curves_of_scores, curves_of_sets
from utils.run.record import RunRecord

# Flags that are not in the card's table of flags: the card shows them elsewhere, or they concern only this machine.
_NOT_SHOWN = {
    'model_type', 'model_id_or_path', 'dataset', 'output_dir', 'resume_from_checkpoint', 'adapter', 'push_to_hub',
    'hub', 'hub_model_id', 'hub_private_repo', 'push_hub_strategy', 'hub_token', 'ignore_args_error',
}  # fmt: skip
_SCORES = ('eval_loss', 'eval_acc', 'eval_rouge-1', 'eval_rouge-2', 'eval_rouge-l', 'eval_bleu-4')
_MAX_TABLE_ROWS = 20
_LINEAGE = ' Its training started from an earlier adapter with the sha256 `{sha256}`.'
_TOKENS = (
    ' It adds {count} tokens to the tokenizer of the base model. Before the adapter is opened with PEFT, the embedding '
    'of the base needs a row for each of them: `model.resize_token_embeddings(len(tokenizer))` with the tokenizer of '
    'this repository, unless the embedding has as many rows already.'
)


def _name(text: Any) -> str:
    """Return the value of a flag as text.

    A path that is absolute or begins with . or ~ is shortened to the name of its last folder or file.
    """
    if isinstance(text, list | tuple):
        return ', '.join(map(_name, text))

    path = PurePath(str(text))
    return path.name if path.is_absolute() or str(text).startswith(('.', '~')) else str(text)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in line) + ' |' for line in lines)


def _number(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _flags(flags: Mapping[str, Any]) -> list[tuple[str, str]]:
    # A record of an older version does not contain newer flags. The run did not use these flags.
    defaults = to_dict(SftArguments())
    return [
        (f'`--{f.name}`', _name(flags[f.name]))
        for f in dataclasses.fields(SftArguments)
        if f.name not in _NOT_SHOWN and flags.get(f.name) not in (None, defaults.get(f.name))
    ]


def model_card(name: str, record: RunRecord, progress: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Return the text of the card as Markdown, with the metadata that both hubs read.

    `progress` has the keys `step`, `log_history` and `data`. `pictures` are the paths of the curves in the repository.
    """
    base = record.base_model
    assert base is not None, 'every run that pushes records it'
    history = progress['log_history']
    adapter = record.flags['sft_type'] == 'lora'

    known = dict.fromkeys([*_SCORES, *curves_of_scores(record.flags), *curves_of_sets(record.flags)])
    evaluations = [entry for entry in history if any(score in entry for score in known)]
    scores = [s for s in known if evaluations and s in evaluations[-1]]
    scored = [(e['step'], *(_number(e.get(s)) for s in scores)) for e in _thin(evaluations)]
    losses = [(e['step'], _number(e['loss'])) for e in _thin([h for h in history if 'loss' in h])]

    data = progress.get('data') or {}
    counts = [f'{part} {data[part].get("rows")} rows' for part in ('train', 'validation') if part in data]
    switch = record.thinking
    thinking = ''
    if switch:
        thinking = f' Pass `{switch}` to its chat template: its replies were trained with it.'

    settings = ' '.join(f'`{word}`' for word in record.flags.get('template_settings') or ())
    if settings:
        thinking += f' Its chat template sets {settings}: its replies were trained with it.'

    tokens = ''
    if adapter and record.added_tokens:
        tokens = _TOKENS.format(count=len(record.added_tokens))

    card = Path(__file__).with_suffix('.md').read_text(encoding='utf-8')
    return card.format(
        name=name,
        base=_name(base['id']),
        library='peft' if adapter else 'transformers',
        tags='lora, ' if adapter else '',
        what='A LoRA adapter for' if adapter else 'All weights, fine-tuned from',
        step=progress['step'],
        thinking=thinking,
        tokens=tokens,
        lineage='' if record.lineage is None else _LINEAGE.format(sha256=record.lineage['sha256']),
        sha256=base['sha256'],
        covers=base['covers'],
        data=': '.join(filter(None, (_name(record.flags['dataset']), ', '.join(counts)))),
        flags=_table(('flag', 'value'), _flags(record.flags)),
        scores=_table(('step', *scores), scored) if scores else 'Not evaluated.',
        pictures=' '.join(f'![{PurePath(picture).stem}]({picture})' for picture in pictures),
        losses=_table(('step', 'loss'), losses),
    )


def _thin(entries: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return at most _MAX_TABLE_ROWS evenly spaced entries, including the last."""
    every = -(-len(entries) // _MAX_TABLE_ROWS) or 1
    return entries[::-1][::every][::-1]
