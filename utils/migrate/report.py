"""Shows a translated recipe: the command, how each key was translated, and the problems of the command."""

from __future__ import annotations

import shlex

from utils.base.errors import Problems
from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.cli.resolve import resolve_sft
from utils.migrate.translation import Kind, Translation

_TITLES: dict[Kind, str] = {
    'used': 'Used, with the same meaning',
    'default': 'Not in the recipe: defaults of {toolkit} that differ from those of llm_sft.py',
    'different': 'Different in meaning',
    'without effect': 'Without effect in llm_sft.py',
    'not understood': 'Not understood, and left out',
}


def flag_words(t: Translation) -> list[str]:
    """Return the flags of the translated command and their values, as words of a command line."""
    return [word for flag, words in t.flags.items() for word in (f'--{flag}', *words)]


def find_problems(t: Translation) -> list[str]:
    """Return the problems of the recipe, and the problems that llm_sft.py finds in the translated command.

    No file is read, and the network is not used.
    """
    resolved = resolve_sft(parse(SftArguments, flag_words(t), program='llm_sft.py', about=''))
    problems = Problems([*t.problems.found])
    for problem in resolved.problems.found:
        problems.add(problem)
    return problems.found


def command(t: Translation) -> str:
    """Return the translated command as text, with one flag on each line."""
    start = 'python llm_sft.py'
    if t.sharded or (t.processes or 1) > 1:
        start = f'torchrun --nproc_per_node {t.processes or 2} llm_sft.py'
    lines = [start, *(shlex.join([f'--{flag}', *words]) for flag, words in t.flags.items())]
    return ' \\\n    '.join(lines)


def render(t: Translation, problems: list[str]) -> str:
    """Return the report as text.

    The value of a key that is not understood, or that can be a secret, is not shown.
    """
    parts = [command(t)]
    if t.sharded and t.processes is None:
        parts.append('The recipe does not say the number of processes: write your number of GPUs for 2.')
    for kind, title in _TITLES.items():
        lines = [f'  {note.key}: {note.text}' for note in t.notes if note.kind == kind]
        if lines:
            parts.append('\n'.join([f'{title.format(toolkit=t.toolkit)}:', *lines]))
    if problems:
        parts.append('\n'.join(['Problems:', *(f'  {problem}' for problem in problems)]))
    return '\n\n'.join(parts)
