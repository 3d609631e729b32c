"""--new_tokens: reads a list of tokens, and adds them to a tokenizer and its model.

The row of a new token in the embedding, and in an output head that is not tied to it, starts as the mean of the rows of
the pieces into which the tokenizer cut its text before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """The ids of new tokens, and for each token the ids of the pieces into which its text was cut before."""

    ids: list[int]
    pieces: list[list[int]]


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of a file, one per line.

    Raises ConfigError, with one problem for each bad line, if the file cannot be read, has no line, or if a line is
    empty, contains whitespace or repeats an earlier line.
    """
    given = f'--new_tokens {path}'
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except OSError as error:
        raise ConfigError(
            f'{given} cannot be read: {error.strerror} (looked in {path.absolute().parent}). Give a text file with one '
            'token per line.'
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f'{given} is not UTF-8. Save it as UTF-8 text with one token per line.') from None

    if not lines:
        raise ConfigError(f'{given} is empty. Write one token per line, or remove --new_tokens.')
    first: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            problems.append(f'{given}: line {number} is empty. Remove it.')
        elif any(character.isspace() for character in line):
            problems.append(
                f'{given}: line {number} ({line!r}) contains whitespace. Write one token without whitespace.'
            )
        elif line in first:
            problems.append(f'{given}: line {number} repeats line {first[line]} ({line!r}). Remove one of the two.')
        first.setdefault(line, number)

    if problems:
        raise ConfigError(*problems)
    return lines


def add_to_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> NewTokens:
    """Add tokens to a tokenizer, and return their ids and pieces. Raises ConfigError if it has a token already."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    if taken := [token for token in tokens if token in known]:
        raise ConfigError(
            *(
                f'--new_tokens: {token!r} is a token of this tokenizer already (id {known[token]}). Remove its line.'
                for token in taken
            )
        )

    pieces = [tokenizer(token, add_special_tokens=False, verbose=False)['input_ids'] for token in tokens]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return NewTokens(ids=tokenizer.convert_tokens_to_ids(list(tokens)), pieces=pieces)


def add_to_model(model: Any, added: NewTokens) -> None:
    """Give new tokens their first rows in the embedding and the output head of a model.

    The embedding gets more rows only if it has none for the new ids. Raises ConfigError if the model cannot have more
    rows.
    """
    import torch

    rows = len(model.get_input_embeddings().weight)
    needed = max(added.ids) + 1
    if needed > rows:
        if model.config.get_text_config().to_dict().get('vocab_size_per_layer_input'):
            raise ConfigError(
                f'--new_tokens: {type(model).__name__} has an embedding in each layer, which is not enlarged. Use '
                'another model, or remove --new_tokens.'
            )
        model.resize_token_embeddings(needed, mean_resizing=False)
        logger.info(f'the embedding has {needed} rows instead of {rows}, for {len(added.ids)} new tokens')
    else:
        logger.info(f'{len(added.ids)} new tokens have rows among the {rows} of the embedding already')

    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tables = [embedding]
    if head is not None and head.weight is not embedding:
        tables.append(head.weight)
    if head is not None and head.bias is not None:
        tables.append(head.bias)
    with torch.no_grad():
        for table in tables:
            for token, pieces in zip(added.ids, added.pieces, strict=True):
                known = table[pieces] if pieces else table
                table[token] = known.float().mean(dim=0).to(table.dtype)


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a model and its tokenizer, and return their ids. The list is empty if there are no tokens."""
    if not tokens:
        return []
    added = add_to_tokenizer(tokenizer, tokens)
    add_to_model(model, added)
    return added.ids
