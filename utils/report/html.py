"""report.html: one self-contained file that shows what a run did and what its checks found.

`python -m utils.report RUN_DIR` writes the file again from the files of the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.formats.conversation import asked_turns
from utils.report.page import Markup, block, figures, page, section, table, text
from utils.report.rows import losses_section
from utils.report.svg import Series, chart
from utils.run.curves import curves_of_scores, curves_of_sets, scores_of
from utils.run.lock import described
from utils.run.outcome import use_commands
from utils.run.read_back import RunFiles, read_run

REPORT_HTML = 'report.html'

# The charts. Each has a title and, for each of its lines, the name and the key in history.json.
CURVES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ('loss', (('training', 'loss'), ('validation', 'eval_loss'))),
    ('validation token accuracy', (('accuracy', 'eval_acc'),)),
    ('validation ROUGE-L', (('ROUGE-L', 'eval_rouge-l'),)),
    ('validation BLEU-4', (('BLEU-4', 'eval_bleu-4'),)),
    ('drift from the base on neutral texts, nats', (('KL', 'eval_drift_kl'),)),
    ('gradient norm', (('gradient norm', 'grad_norm'),)),
    ('learning rate', (('learning rate', 'learning_rate'),)),
)


def curves_of(*runs: RunFiles) -> list[tuple[str, Sequence[tuple[str, str]]]]:
    """Return the charts for these runs as a list of (title, lines). A line is (name, key in history.json).

    Every run has the charts in CURVES. If a run scores generated answers, it also has a chart for each score. If a run
    has two or more validation sets, it also has charts for each set.
    """
    scores = {key: title for run in runs for key, title in curves_of_scores(run.record.flags).items()}
    sets = {key: title for run in runs for key, title in curves_of_sets(run.record.flags).items()}
    return [
        *((title, [(title, key)]) for key, title in scores.items()),
        *CURVES,
        *((title, [(title, key)]) for key, title in sets.items()),
    ]


def curves(run: RunFiles) -> Markup:
    """Return the charts of a run as HTML. A chart without points is omitted."""
    drawn = [
        chart(title, [Series(name=name, points=run.curve(key), colour=i) for i, (name, key) in enumerate(lines, 1)])
        for title, lines in curves_of(run)
    ]
    return Markup(f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else '')


def _verdict(passed: bool | None) -> Markup:
    if passed is None:
        return Markup('<span class="word faint">not checked</span>')
    word, colour = ('holds', 'good') if passed else ('fails', 'bad')
    return Markup(f'<span class="word {colour}">{word}</span>')


def _proofs(run: RunFiles) -> Markup:
    rows = [
        [name.replace('_', ' '), _verdict(outcome.get('passed')), outcome.get('says') or '']
        for name, outcome in run.proofs.items()
    ]
    if not rows:
        return Markup('')
    seconds = sum(outcome.get('seconds') or 0 for outcome in run.proofs.values())
    whole = f' of {run.outcome["seconds"]} s' if 'seconds' in run.outcome else ''
    cost = f'All checks took {seconds:.1f} s{whole}.'
    return Markup(table(['proof', 'outcome', 'what was checked'], rows) + f'<p class="faint">{text(cost)}</p>')


def _answers(run: RunFiles) -> list[Markup]:
    return [
        Markup(
            _asked(row)
            + table(['', f'{row["split"]} row'], [[name, row[name]] for name in ('wanted', 'before', 'after')])
        )
        for row in run.answers
    ]


def _asked(row: dict[str, Any]) -> Markup:
    """Return the question of an answered row as HTML. For plain text, return the beginning of the text."""
    if 'beginning' in row:
        says = '<p class="faint">plain text: the model continues its beginning</p>'
        return Markup(f'{says}{block(row["beginning"])}')
    turns = asked_turns(row['messages'])
    return block('\n'.join(said if mark == 'QUERY' else f'[{mark}] {said}' for mark, said in turns))


def _sample(sample: str) -> Markup:
    """Return a decoded row as HTML. The trained parts, which are between ⟦ and ⟧ in `sample`, are highlighted."""
    if not sample:
        return Markup('')
    marked = text(sample.strip()).replace('⟦', '<mark>').replace('⟧', '</mark>')
    return block(Markup(marked))


def _data(run: RunFiles) -> list[Markup]:
    data = run.outcome.get('data', {})
    parts = {name: data[name] for name in ('train', 'validation') if name in data}
    if not parts:
        return []

    keys = list(next(iter(parts.values())))
    rows = [[name, *(part.get(key, '') for key in keys)] for name, part in parts.items()]
    counts = table(['rows of', *(key.replace('_', ' ') for key in keys)], rows)

    changed = [[count, 'skipped', reason] for reason, count in data.get('left_out', {}).items()]
    changed += [[count, 'noted, trained', reason] for reason, count in data.get('noted', {}).items()]
    changes = Markup('<p>No row was skipped or altered.</p>')
    if changed:
        changes = table(['rows', 'what happened', 'why'], changed)

    repeated = ''
    if 'distinct_rows' in data.get('train', {}):
        repeated = '<p>Rows that are repeated count each time under "rows of", and once everywhere below.</p>'
    given = [[name, rows] for name, rows in data.get('mixture', {}).items()]
    mixture = Markup(table(['data set of the mixture', 'rows of an epoch'], given) if given else '')
    return [counts, mixture, Markup(repeated), changes, *_account(data.get('account', {}))]


def _sets(run: RunFiles) -> Markup:
    """Return a table with the rows and last scores of each validation set.

    Returns '' if there are fewer than two sets, or if the last evaluation has no scores.
    """
    last = run.outcome.get('last_evaluation') or {}
    rows = run.outcome.get('data', {}).get('validation_sets', {})
    scores = [score for score in scores_of(run.record.flags) if f'eval_{score}' in last]
    if len(rows) < 2 or not scores:
        return Markup('')
    lines = [[name, count, *(last.get(f'eval_{name}_{score}', '') for score in scores)] for name, count in rows.items()]
    lines.append(['all', sum(rows.values()), *(last[f'eval_{score}'] for score in scores)])
    return table(['validation set', 'rows', *scores], lines)


def _account(account: dict[str, Any]) -> list[Markup]:
    """Return tables that show what became of the characters of the data. Returns [] if nothing was counted.

    The first table has a row for each field of the data. It has a column for each kind of use, such as 'trained' or
    'cut', with the number of characters. A second table lists the fields with unused text, and in how many rows each
    of them has unused text. It is omitted if there are no such fields.
    """
    fields = account.get('fields', {})
    if not fields:
        return []

    buckets = list(dict.fromkeys(bucket for counts in fields.values() for bucket in counts))
    rows = [[label, *(counts.get(bucket, 0) for bucket in buckets)] for label, counts in fields.items()]
    unused = [[name, count] for name, count in account.get('unused', {}).items()]
    tables = [table(['characters of', *buckets], rows)]
    return [*tables, table(['not used', 'rows'], unused)] if unused else tables


def _tiles(run: RunFiles) -> Markup:
    outcome = run.outcome
    last = outcome.get('last_evaluation') or {}
    pairs = (
        ('steps', outcome.get('steps')),
        ('training loss', outcome.get('train_loss')),
        ('validation loss', last.get('eval_loss')),
        ('token accuracy', last.get('eval_acc')),
        ('ROUGE-L', last.get('eval_rouge-l')),
        *((key.removeprefix('eval_'), last.get(key)) for key in curves_of_scores(run.record.flags)),
        ('drift, KL in nats', last.get('eval_drift_kl')),
        ('tokens per second', outcome.get('train_tokens_per_second')),
        ('peak memory, GiB', outcome.get('peak_memory_gib')),
        ('held by the allocator, GiB', outcome.get('peak_reserved_gib')),
        ('seconds', outcome.get('seconds')),
    )
    shown = [(name, f'{v:,.4g}' if isinstance(v, float) else v) for name, v in pairs if v is not None]
    return figures(shown) if shown else Markup('')


def _title(run: RunFiles) -> tuple[str, str]:
    """Return two texts for the top of the report: the name of the model, and a line with the method and the data."""
    flags = run.record.flags
    method = 'all weights' if flags['sft_type'] == 'full' else 'LoRA'
    bits = f', {flags["quantization_bit"]}-bit base' if flags.get('quantization_bit') else ''
    name = flags.get('model_type') or flags.get('model_id_or_path') or run.folder.name
    start = ''
    if lineage := run.record.lineage:
        start = f', from the adapter {lineage["path"]} (sha256 {lineage["sha256"][:12]}...)'
    return name, f'{method}{bits}{start} on {", ".join(flags["dataset"])} · {run.folder.name}'


def _versions(outcome: dict[str, Any]) -> list[tuple[str, str]]:
    own = [('this toolkit', described(outcome['toolkit']))] if 'toolkit' in outcome else []
    return [*own, *sorted(outcome.get('versions', {}).items())]


def render(run: RunFiles) -> str:
    """Return the whole report as HTML. A section without content is omitted."""
    name, how = _title(run)
    outcome = run.outcome
    best = outcome.get('best_checkpoint')
    merge = f'python llm_infer.py --ckpt_dir {best} --merge_lora_and_save true'
    repeat = f'python llm_sft.py --from_run {run.folder}'
    commands = [*use_commands(best, outcome).values(), merge, repeat] if best else []
    return page(
        f'{name}: {run.folder.name}',
        Markup(f'<h1>{text(name)}</h1><p class="faint">{text(how)}</p>'),
        _tiles(run),
        _line(outcome['ended_early']) if outcome.get('ended_early') else '',
        section('What was proven', _proofs(run)),
        section('Validation sets at the last evaluation', _sets(run)),
        section('Curves', curves(run)),
        section('Before and after', *_answers(run)),
        section('Validation rows before and after', *losses_section(run.rows)),
        section('Use it and repeat it', *map(block, commands)),
        section('Data', *_data(run)),
        section('One row as it was trained (the marked text has loss)', _sample(run.sample)),
        section('Decisions', *map(_line, outcome.get('decisions', []))),
        section('Warnings', *map(_line, outcome.get('warnings', []))),
        section('Arguments', _folded('every argument as used', sorted(run.record.to_json().items()))),
        section('Versions', table(['library', 'version'], _versions(outcome))),
    )


def _line(line: str) -> Markup:
    return Markup(f'<p>{text(line)}</p>')


def _folded(title: str, rows: list[tuple[str, Any]]) -> Markup:
    return Markup(f'<details><summary>{text(title)}</summary>{table(["argument", "value"], rows)}</details>')


def write_report(run_dir: Path) -> Path:
    """Write report.html from the files of a run folder. Returns the path of report.html.

    Raises ConfigError if the run folder cannot be read, or if report.html cannot be written.
    """
    target = run_dir / REPORT_HTML
    content = render(read_run(run_dir))
    try:
        target.write_text(content, encoding='utf-8')
    except OSError as error:
        raise ConfigError(
            f'{target}: the report cannot be written: {error.strerror}. Correct the permissions, or free disk space.'
        ) from error
    return target
