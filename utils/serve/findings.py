"""Judges the compared rows: whether the server agrees with the run, and if not, what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from utils.serve.client import Reply
from utils.serve.compare import Agreement, Checked, first_different
from utils.serve.expected import Model

_SHOWN_CHARACTERS = 40
# The log probabilities of run and base must differ by more than this number to tell the two apart.
_TELLING = 0.01
_TEMPLATE_REMEDY = (
    'Serve the chat template of the run: chat_template.jinja of the checkpoint or of the merged folder (for vLLM and '
    'SGLang: --chat-template FILE).'
)
_ADAPTER_REMEDY = (
    'Serve the merged folder, or name the adapter as the model: --served_model NAME here, model=NAME in your client.'
)


class Finding(NamedTuple):
    """The result of one comparison: its name, whether the server agrees, what was observed, and the remedy.

    `agrees` is None if the finding is only a note, for example because nothing could be compared.
    """

    name: str
    agrees: bool | None
    says: str
    remedy: str = ''

    def line(self) -> str:
        """Return the finding as text, with the remedy in a second line."""
        mark = {True: 'ok  ', False: 'FAIL', None: 'note'}[self.agrees]
        return f'{mark} {self.name}: {self.says}' + (f'\n     -> {self.remedy}' if self.remedy else '')


def findings(rows: Sequence[Checked], model: Model, *, has_base: bool, rounding: float) -> list[Finding]:
    """Return the findings on the compared rows, of which there is at least one. The first finding is about the prompts.

    `model` is the model of the run.

    If `has_base` is True, the run has an adapter, and each row was also compared with the base model. `rounding` is the
    largest difference of two log probabilities that still counts as rounding.
    """
    return [
        _on_prompts(rows, model),
        _on_adapter(rows, has_base=has_base),
        _on_answers(rows),
        *_on_stops(rows),
        _on_first(rows, rounding),
    ]


def _on_prompts(rows: Sequence[Checked], model: Model) -> Finding:
    shown = [row for row in rows if row.served_ids is not None]
    counted = [row for row in rows if row.reply.prompt_tokens is not None]
    wrong_ids = [row for row in shown if row.served_ids != row.ids]
    wrong_counts = [row for row in counted if row.reply.prompt_tokens != len(row.ids)]
    if wrong_ids:
        row = wrong_ids[0]
        at, run, server = first_different(row.ids, row.served_ids or [], model)
        says = (
            f'template differs at token {at}: run {quoted(run)} server {quoted(server)} ({row.origin}; '
            f'{len(wrong_ids)} of {len(shown)} rows differ)'
        )
        return Finding('prompts', False, says, _TEMPLATE_REMEDY)
    if wrong_counts:
        row = wrong_counts[0]
        says = (
            f'template differs: the prompt has {len(row.ids)} tokens in the run and {row.reply.prompt_tokens} on the '
            f'server ({row.origin}; {len(wrong_counts)} of {len(counted)} rows differ; {_ids_known(shown)})'
        )
        return Finding('prompts', False, says, _TEMPLATE_REMEDY)
    if len(shown) == len(rows):
        return Finding('prompts', True, f'token ids equal in {len(shown)} of {len(rows)} rows')
    if counted:
        says = f'number of tokens equal in {len(counted)} of {len(rows)} rows; {_ids_known(shown)}'
        return Finding('prompts', True, says)
    left = 'not compared' if not shown else f'{len(rows) - len(shown)} of {len(rows)} rows not compared'
    return Finding('prompts', None, f'{left}: the server counts no prompt tokens; {_ids_known(shown)}')


def _ids_known(shown: Sequence[Checked]) -> str:
    return f'token ids equal in {len(shown)} rows' if shown else 'the server shows no token ids'


def template_differs(agreeing: int, tried: int) -> Finding:
    """Return the finding that the server and the run have different chat templates.

    `tried` is the number of prompts that were sent a second time, as raw prompts, to which the server applies no
    template. `agreeing` is the number of answers that then were equal to those of the run, up to rounding.
    """
    says = (
        'template differs: the server shows no token ids, but it answers as the run if it gets the prompt of the run '
        f'without a template ({agreeing} of {tried} rows tried)'
    )
    return Finding('prompts', False, says, _TEMPLATE_REMEDY)


def _on_adapter(rows: Sequence[Checked], *, has_base: bool) -> Finding:
    if not has_base:
        return Finding('adapter', None, 'not compared with the base: no adapter is loaded here')
    telling = [row for row in rows if row.base_differs and row.agreement is not None]
    of_base = sum(row.answered_by == 'base' for row in telling)
    of_run = sum(row.answered_by == 'run' for row in telling)
    if of_base > of_run:
        says = (
            f"the adapter is not active: answers are the base's in {of_base} of the {len(telling)} rows that the base "
            'answers differently'
        )
        return Finding('adapter', False, says, _ADAPTER_REMEDY)
    if of_run:
        return Finding(
            'adapter', True, f'active: {of_run} of the {len(telling)} rows that the base answers differently'
        )
    return _adapter_by_first(rows, len(telling))


def _adapter_by_first(rows: Sequence[Checked], telling: int) -> Finding:
    pairs = [(row.first, row.first_base) for row in rows if row.first is not None and row.first_base is not None]
    run = fmean(one for one, _ in pairs) if pairs else 0.0
    base = fmean(other for _, other in pairs) if pairs else 0.0
    figures = f'first log probabilities differ by {run:.3g} from the run and by {base:.3g} from the base (means)'
    if base < run / 2 and run > _TELLING:
        return Finding('adapter', False, f'the adapter is not active: {figures}', _ADAPTER_REMEDY)
    if run < base / 2 and base > _TELLING:
        return Finding('adapter', True, f'active: {figures}')
    if telling:
        says = (
            f'not shown to be active: it agrees with neither in the {telling} rows that run and base answer differently'
        )
        return Finding('adapter', None, says)
    says = 'not shown to be active: run and base answer all compared rows alike'
    return Finding('adapter', None, says, 'Check more rows: --show_dataset_sample -1')


def _on_answers(rows: Sequence[Checked]) -> Finding:
    kinds = [row.agreement.kind for row in rows if row.agreement is not None]
    parts = [f'answers equal {kinds.count("equal")} of {len(rows)}']
    if nearly := kinds.count('rounding'):
        parts.append(f'{nearly} differ where two tokens are equally likely up to rounding')
    if not_compared := len(rows) - len(kinds):
        parts.append(f'{not_compared} not compared, because the server took tool calls out of them')
    if not kinds:
        remedy = 'Start the server without a parser of tool calls, so that answers are compared as text.'
        return Finding('answers', False, 'none compared, because the server took tool calls out of all', remedy)
    if 'different' not in kinds:
        return Finding('answers', True, ', '.join(parts))

    first = next(row for row in rows if row.agreement is not None and not row.agreement.holds)
    assert first.agreement is not None, 'chosen'
    parts.append(f'{kinds.count("different")} differ, first {first.origin} at {_where(first.agreement, first.reply)}')
    remedy = 'If only this line fails, the server may compute in another dtype: give it here too with --dtype.'
    return Finding('answers', False, ', '.join(parts), remedy)


def _where(agreement: Agreement, reply: Reply) -> str:
    far = 'far less likely here' if agreement.gap is None else f'less likely by {agreement.gap:.2g}'
    if reply.reasoning:
        far = 'compared as a whole, because the server took the reasoning out'
    elif not agreement.server_rest and reply.finish == 'length':
        far = 'the server cut its answer at a maximum number of tokens'
    run, server = (quoted(text) if text else 'the end' for text in (agreement.model_rest, agreement.server_rest))
    return f'token {agreement.at}: run {run} server {server} ({far})'


def _on_stops(rows: Sequence[Checked]) -> list[Finding]:
    """Return a finding about answers that are too long, and one about answers that are too short, if there are any.

    An answer of the server is too long if it goes on after the end of the run's answer. It is too short if the server
    ended it, and the run's answer goes on there.
    """
    made = []
    for kind, says in (
        ('late', 'the server goes on after the end of turn of the run'),
        ('early', 'the server ends answers where the run goes on'),
    ):
        found = [row for row in rows if row.stops == kind]
        if found:
            remedy = (
                'Compare eos_token_id in generation_config.json of the served folder with that of the merged folder, '
                'and the stop settings of the server.'
            )
            says = f'{says} in {len(found)} of {len(rows)} rows (first {found[0].origin})'
            made.append(Finding('end of turn', False, says, remedy))
    return made


def _on_first(rows: Sequence[Checked], rounding: float) -> Finding:
    given = [row.first for row in rows if row.first is not None]
    if not given:
        why = 'the server gives none'
        if any(row.reply.first for row in rows):
            why = 'the server lists no token that is likely here'
        return Finding('first log probabilities', None, f'not compared: {why}')
    says = f'differ by at most {max(given):.3g} in {len(given)} rows'
    return Finding('first log probabilities', max(given) <= rounding, says)


def quoted(text: str) -> str:
    """Return the beginning of a text in quotes, with special characters written as escapes."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f'{text[:_SHOWN_CHARACTERS]}...')
