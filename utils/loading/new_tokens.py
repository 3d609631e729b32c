"""--new_tokens: reads a list of tokens, and adds them to a tokenizer and its model.

A new token gets a row in the embedding. If the output head is not tied to the embedding, the token also gets a row in
the output head. Before a token is added, the tokenizer cuts its text into several tokens, the pieces. The initial value
of a new row is the mean of the rows of the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError
from utils.base.logger import logger
from utils.loading.folder import is_adapter, read_adapter_config
from utils.loading.layers import is_sharded

# The file in a run folder with the tokens of the run. --from_run reads it instead of the file that was typed.
TOKENS_FILE = 'new_tokens.txt'


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """The ids of new tokens, and the ids of the pieces of each token.

    The pieces are the tokens into which the tokenizer cut the text of a new token before the token was added.
    """

    ids: list[int]
    pieces: list[list[int]]


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of a file, one per line.

    Raises ConfigError if the file cannot be read or is empty. A line that is empty, contains whitespace or repeats an
    earlier line is also a problem. The error names all such lines.
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
    """Add tokens to a tokenizer, and return their ids and pieces.

    The pieces of a new token are the tokens into which the tokenizer cut its text before the token was added.

    The new tokens are found everywhere in a text, also inside words. They stay visible when ids are decoded. Raises
    ConfigError, with one problem for each bad token. A token is bad if it is in the tokenizer already, or if it
    contains a special token.
    """
    from tokenizers import AddedToken

    pieces = [tokenizer(token, add_special_tokens=False, verbose=False)['input_ids'] for token in tokens]
    known = tokenizer.get_vocab()
    special = [token for token in tokenizer.all_special_tokens if token]
    problems = []
    for token, ids in zip(tokens, pieces, strict=True):
        same = known.get(token, _same_token(tokenizer, token, ids))
        if same is not None:
            problems.append(
                f'--new_tokens: {token!r} is a token of this tokenizer already (id {same}). Remove its line.'
            )
        elif inside := next((one for one in special if one in token), None):
            problems.append(
                f'--new_tokens: {token!r} contains {inside!r}, a special token of this tokenizer, which would no '
                'longer be found in it. Remove its line.'
            )
    if problems:
        raise ConfigError(*problems)

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return NewTokens(ids=tokenizer.convert_tokens_to_ids(list(tokens)), pieces=pieces)


def mark_special(tokenizer: Any, ids: Sequence[int]) -> None:
    """Mark added tokens as special, so that programs that decode answers do not show them."""
    from tokenizers import AddedToken

    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens], special_tokens=True)


def _same_token(tokenizer: Any, token: str, ids: Sequence[int]) -> int | None:
    """Return the id of an existing token that is decoded to the text `token`. Returns None if there is none.

    `ids` are the ids into which the tokenizer now encodes this text. The vocabulary is not searched for the text,
    because some vocabularies write spaces as '▁' or bytes as letters.
    """
    is_same = len(ids) == 1 and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids) == token
    return ids[0] if is_same else None


def add_to_model(model: Any, added: NewTokens) -> None:
    """Set the rows of new tokens in the embedding and the output head of a model to their initial values.

    The embedding and the head are enlarged only if they have too few rows for the new ids. Raises ConfigError if the
    weights are sharded, if the embedding or the head is quantised, if the model must be enlarged and cannot be, or if
    the model uses one of the new ids already, for example as its pad_token_id.
    """
    import torch

    tables = _tables(model)
    _check_model(model, tables, added)
    rows = min(map(len, tables))
    needed = max(added.ids) + 1
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
        tables = _tables(model)
        logger.info(f'the embedding was enlarged from {rows} to {needed} rows, for {len(added.ids)} new tokens')
    else:
        logger.info(f'the embedding was not enlarged: it has {rows} rows, enough for the {len(added.ids)} new tokens')

    with torch.no_grad():
        for table in tables:
            # Not random, because tokens of the tokenizer that had no row get one too.
            table[rows:] = table[:rows].mean(dim=0, dtype=torch.float32).to(table.dtype)
            for token, pieces in zip(added.ids, added.pieces, strict=True):
                known = table[pieces] if pieces else table[:rows]
                table[token] = known.float().mean(dim=0).to(table.dtype)


def _tables(model: Any) -> list[Any]:
    """Return the tensors with a row for each token: embedding, output head (if not tied), bias of the head (if any)."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tables = [embedding]
    if head is not None and head.weight is not embedding:
        tables.append(head.weight)
    if head is not None and head.bias is not None:
        tables.append(head.bias)
    return tables


def _check_model(model: Any, tables: Sequence[Any], added: NewTokens) -> None:
    """Raise ConfigError if rows for these new tokens cannot be added to the model."""
    name = type(model).__name__
    if is_sharded(model):
        raise ConfigError(
            f'--new_tokens: the weights of {name} are sharded, so rows cannot be added to its embedding. Use '
            '--deepspeed_config_path ds_config/zero2.json, or one process.'
        )
    if not all(table.is_floating_point() for table in tables):
        raise ConfigError(
            f'--new_tokens: the embedding or the output head of {name} is quantised, so it cannot have new rows. Use '
            'the model without quantisation.'
        )
    is_too_small = max(added.ids) >= min(map(len, tables))
    if is_too_small and model.config.get_text_config().to_dict().get('vocab_size_per_layer_input'):
        raise ConfigError(
            f'--new_tokens: {name} has an embedding in each layer, and these embeddings cannot be enlarged. Use '
            'another model, or remove --new_tokens.'
        )

    for settings in filter(None, (model.config, model.config.get_text_config(), model.generation_config)):
        for setting, value in settings.to_dict().items():
            used = value if isinstance(value, list) else [value]
            if setting.endswith(('_token_id', '_token_index')) and (taken := set(used) & set(added.ids)):
                raise ConfigError(
                    f'--new_tokens: the model uses the id {min(taken)} as its {setting}, and its tokenizer has no '
                    'token with this id. Use a model whose tokenizer is complete, or remove --new_tokens.'
                )


def check_rows(checkpoint: Path, ids: Sequence[int]) -> None:
    """Raise ConfigError if the new tokens of an adapter had different ids when the adapter was trained.

    `ids` are the ids of the new tokens now. Nothing is checked if the checkpoint holds a whole model, or if its
    adapter_config.json states no ids of new tokens.
    """
    if not is_adapter(checkpoint):
        return
    stored = read_adapter_config(checkpoint).get('trainable_token_indices') or {}
    for trained in stored.values() if isinstance(stored, dict) else [stored]:
        if trained != list(ids):
            raise ConfigError(
                f'{checkpoint}: its new tokens had the ids {_listed(trained)} in training, and the tokenizer of the '
                f'base model now gives them {_listed(ids)}. Put back the tokenizer files with which the run was '
                'trained.'
            )


def _listed(ids: Sequence[int]) -> str:
    return ', '.join(map(str, ids)) or 'none'


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a model and its tokenizer, and return their ids. The list is empty if there are no tokens."""
    if not tokens:
        return []
    added = add_to_tokenizer(tokenizer, tokens)
    add_to_model(model, added)
    return added.ids
