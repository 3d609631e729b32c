"""Finds the tokens that a run adds to the tokenizer of its base model (--new_tokens)."""

from __future__ import annotations

from pathlib import Path

from utils.base.errors import ConfigError
from utils.base.names import LAST
from utils.cli.arguments import SftArguments
from utils.cli.parser import Parsed
from utils.loading.new_tokens import read_tokens
from utils.run.record import find_record


def check_new_tokens(parsed: Parsed[SftArguments]) -> None:
    """Call `find_new_tokens`, and add its errors to the problems of the command line."""
    try:
        find_new_tokens(parsed.args)
    except ConfigError as error:
        for problem in error.problems:
            parsed.problems.add(problem)


def find_new_tokens(args: SftArguments) -> list[str]:
    """Return the tokens that a run adds to the tokenizer of its base model, or an empty list.

    A run that is resumed, or that starts from an adapter, has the tokens of the earlier run. If this run names other
    tokens with --new_tokens, raises ConfigError. Also raises ConfigError if a file cannot be read.
    """
    typed = None if args.new_tokens is None else read_tokens(Path(args.new_tokens))
    earlier = args.adapter if args.resume_from_checkpoint in (None, LAST) else args.resume_from_checkpoint
    record = None if earlier is None else find_record(Path(earlier))
    if record is None:
        return typed or []

    tokens = list(record.added_tokens)
    if typed is not None and typed != tokens:
        raise ConfigError(
            f'--new_tokens {args.new_tokens}: {earlier} was trained with different new tokens '
            f'({", ".join(tokens) or "none"}). Remove --new_tokens, or start a new run on the base model.'
        )
    return tokens
