"""The data sets of a recipe, as values of --dataset, --val_dataset and --columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from utils.formats.data_file import SUFFIXES
from utils.migrate.translation import Translation

COLUMNS_KEY = '(columns)'


@dataclass(kw_only=True)
class Rows:
    """The values of --dataset and --val_dataset for a recipe, and the names of the columns.

    `columns` is {name in the file: name that llm_sft.py reads}. --columns renames a column if the two names differ.

    In each method, `key` is a key of the recipe. Notes and problems mention this key.
    """

    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)

    def rename(self, t: Translation, key: str, names: Mapping[str, str]) -> None:
        """Record the names of columns for --columns. `names` is {name in the file: name that llm_sft.py reads}.

        A second, different name for the same column is a problem.
        """
        for column, meaning in names.items():
            if self.columns.setdefault(column, meaning) != meaning:
                t.refuse(
                    key,
                    f"the column '{column}' means {self.columns[column]} in one data set and {meaning} in another, "
                    'and --columns holds for all of them. Rename the columns in one of the files.',
                )

    def chat(self, t: Translation, key: str, column: str, role_key: str, content_key: str) -> None:
        """Record that `column`, which has conversations, must be renamed to `messages`.

        A column with the name `messages` or `conversations` needs no new name. `role_key` and `content_key` are two
        keys of each message in the file. They are only checked: if `role_key` is not 'role' or 'from', or `content_key`
        is not 'content' or 'value', a problem is added to `t`.
        """
        if role_key not in ('role', 'from') or content_key not in ('content', 'value'):
            t.refuse(
                key,
                f'its messages have the keys {role_key} and {content_key}, but llm_sft.py reads only role and content, '
                'or from and value. Rename the keys in the file.',
            )
        elif column not in ('messages', 'conversations'):
            self.rename(t, key, {column: 'messages'})

    def text(self, t: Translation, key: str, column: str) -> None:
        """Record that `column`, which has plain text, must be renamed to `text`. Adds a note.

        The note says that training uses every token of the text.
        """
        t.note('different', key, 'rows with a column text are trained on every token, and the end of text is added')
        self.rename(t, key, {column: 'text'})

    def finish(self, t: Translation, key: str) -> None:
        """Set --dataset, --val_dataset and --columns.

        If there are no training rows, adds a problem, unless the recipe has other problems already.
        """
        if self.train:
            t.use(key, 'dataset', self.train)
        elif not t.problems.found:
            t.refuse(key, 'the recipe names no data set. Add it to the recipe, or type --dataset.')
        if self.val:
            t.use(key, 'val_dataset', self.val)
        if renamed := [f'{name}={meaning}' for name, meaning in self.columns.items() if name != meaning]:
            t.use(COLUMNS_KEY, 'columns', renamed)


def hub_word(prefix: str, repo_id: str, *parts: str, revision: str = '') -> str:
    """Return the value of --dataset for a data set on a hub.

    `prefix` is the prefix of the hub, for example hf:, or ''. `parts` are the subset and the split, or the name of a
    file. Empty parts are left out.
    """
    word = ':'.join([f'{prefix}{repo_id}', *(part for part in parts if part)])
    return f'{word}@{revision}' if revision else word


def is_file(path: str) -> bool:
    """Return whether `path` is a local path, not a hub id: it ends like a data file, or begins with /, ./, ../ or ~."""
    return path.lower().endswith((*SUFFIXES, '.txt', '.md')) or path.startswith(('/', './', '../', '~'))


def limit_rows(t: Translation, key: str, words: list[str], count: int) -> list[str]:
    """Return the words with #count appended. A word that already has a # is not changed.

    The toolkit of the recipe takes the first `count` rows. With #count, llm_sft.py draws `count` random rows. A note
    about this difference is added to `t`. `words` are values of --dataset.
    """
    t.note('different', key, f'{count} rows of each data set are drawn at random; {t.toolkit} takes the first rows')
    return [word if '#' in word else f'{word}#{count}' for word in words]
