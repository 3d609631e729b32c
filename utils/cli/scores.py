"""Checks the values of --score: names of built-in scores, and functions of the user as FILE.py:name.

A file of the user is only parsed here. It is not executed.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.base.errors import Problems, did_you_mean

BUILT_IN = ('rouge', 'exact', 'json')
# Other values that an evaluation logs as eval_<name>. A function with such a name would replace them.
_TAKEN = {
    'loss', 'acc', 'runtime', 'samples_per_second', 'steps_per_second', 'model_preparation_time', 'drift_kl',
    *BUILT_IN,
}  # fmt: skip


class OwnScore(NamedTuple):
    """A score FILE.py:name: the function `name` in a Python file of the user."""

    file: Path
    function: str


def own_score(word: str) -> OwnScore | None:
    """Return the file and the function that a word of --score names. Returns None for a word of another form."""
    file, colon, function = word.rpartition(':')
    return OwnScore(Path(file), function) if colon and file.endswith('.py') else None


def own_words(words: Sequence[str]) -> list[str]:
    """Return the words of --score that have the form FILE.py:name."""
    return [word for word in words if own_score(word) is not None]


def score_name(word: str) -> str:
    """Return the name of a score. Its value is logged as eval_<name>. The name of `rouge` is rouge-l."""
    own = own_score(word)
    if own is not None:
        return own.function
    return 'rouge-l' if word == 'rouge' else word


def check_scores(words: Sequence[str], problems: Problems, sets: Sequence[str] = ()) -> None:
    """Add a problem for each word of --score that names no score, or whose name is taken by another logged value.

    `sets` has the names of the validation sets. Each validation set gets its own value of each score.
    """
    seen: set[str] = set()
    for word in words:
        own = own_score(word)
        if own is None and word not in BUILT_IN:
            problems.add(
                f"--score '{word}' is not known{did_you_mean(word, BUILT_IN)} Give {', '.join(BUILT_IN)} or "
                'FILE.py:name, the function `name` of a file.'
            )
        elif own is not None and not own.function.isidentifier():
            problems.add(f"--score '{word}': '{own.function}' is not the name of a function. Give FILE.py:name.")
        elif own is not None and own.function in _TAKEN:
            problems.add(
                f"--score '{word}': '{own.function}' is the name of a different logged value. Rename the function."
            )
        elif score_name(word) in seen:
            problems.add(f"--score '{word}': the score '{score_name(word)}' is named twice. Name it once.")
        seen.add(score_name(word))
    if len(sets) > 1:
        _check_names_of_sets(words, sets, problems)


def _check_names_of_sets(words: Sequence[str], sets: Sequence[str], problems: Problems) -> None:
    """Add a problem for each metric <set>_<score> that has the same name as another metric."""
    taken = {*_TAKEN, *map(score_name, words)}
    for name, word in itertools.product(sets, dict.fromkeys(words)):
        logged = f'{name}_{score_name(word)}'
        if logged in taken:
            problems.add(
                f"--score '{word}': the score of the validation set '{name}' would be logged as '{logged}', but "
                'another value is logged under this name. Rename a score function or the file of the validation set.'
            )
        taken.add(logged)


def check_score_files(words: Sequence[str], problems: Problems) -> None:
    """Add a problem for each file of --score that is missing or broken, or has no function of the typed name."""
    for word in own_words(words):
        own = own_score(word)
        assert own is not None, 'filtered'
        if not own.file.is_file():
            problems.add(
                f'--score {word}: {own.file} is not a file (looked in {own.file.absolute().parent}). Correct the path.'
            )
            continue

        try:
            names = _defined_names(own.file.read_bytes())
        except (SyntaxError, ValueError, OSError) as error:
            line = f':{error.lineno}' if isinstance(error, SyntaxError) and error.lineno else ''
            why = error.msg if isinstance(error, SyntaxError) else error
            problems.add(f'--score {word}: {own.file}{line} cannot be read: {why}. Correct the file.')
            continue
        if own.function.isidentifier() and own.function not in names and '*' not in names:
            problems.add(
                f"--score {word}: {own.file} defines no function '{own.function}'"
                f'{did_you_mean(own.function, names)} Add the function, or correct the name.'
            )


def _defined_names(source: bytes) -> set[str]:
    """Return the names that a file defines or imports, and '*' if it imports all names of a module.

    Names inside functions and classes are not included.
    """
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # the names inside are not names of the file
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split('.')[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        nodes += ast.iter_child_nodes(node)
    return names
