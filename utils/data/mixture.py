"""Shares of data sets in a mixture (--dataset name%0.3): how many rows each set gives, and which are repeated."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from utils.base.errors import ConfigError
from utils.data.parts import TRAIN, UNUSED, Part, draw_uses


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A data set of a mixture. `share` is None if --dataset gives the data set no share.

    `word` is the value of --dataset that names the set, for example 'sql-demo%0.3'.
    """

    word: str
    part: Part
    share: Fraction | None


def split_size(size: int, shares: Sequence[Fraction]) -> list[int]:
    """Split a number of rows by shares, with the largest-remainder method. Returns counts that sum to `size`.

    Shares that do not sum to 1 are scaled. Of equal remainders, the first is rounded up.
    """
    quotas = [size * share / sum(shares) for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - quotas[i])
    for index in by_remainder[: size - sum(counts)]:
        counts[index] += 1
    return counts


def mix(ingredients: Sequence[Ingredient], *, limit: int, seed: int) -> str:
    """Choose the training rows of a mixture of data sets. Returns a log line with the number of rows of each set.

    If all sets have a share, the mixture has `limit` rows. With a negative `limit`, the mixture has as many rows as all
    sets have training rows together.

    If some sets have no share, these sets give all their training rows. For example, one set has 700 rows and no share,
    and another set has the share 0.3. Then the 700 rows are 0.7 of the mixture, so the mixture has 1000 rows.

    If such a mixture is larger than `limit`, all sets are reduced in proportion. In the example, limit=100 gives 70
    random rows of the first set and 30 rows of the second set. A negative `limit` reduces nothing.

    Raises ConfigError if a set with a share gives no row.
    """
    shared = [one for one in ingredients if one.share is not None]
    others = [one for one in ingredients if one.share is None]
    available = {id(one): one.part.uses.count(TRAIN) for one in ingredients}
    whole = sum(available[id(one)] for one in others)
    shares = [one.share for one in shared if one.share is not None]
    rest = 1 - sum(shares, Fraction(0))

    if not others:
        size = limit if limit >= 0 else sum(available.values())
        counts = split_size(size, shares)
    else:
        size = round(whole / rest)
        counts = split_size(size - whole, shares)
        if 0 <= limit < size:
            size = limit
            *counts, whole = split_size(size, [*shares, rest])
        draw_uses([one.part for one in others], TRAIN, whole, seed, drawn=TRAIN, rest=UNUSED)

    for one, count in zip(shared, counts, strict=True):
        _check_rows(one, available[id(one)], count, size)
        _select_rows(one.part, count, seed)
    given = [_described(one, available[id(one)], size) for one in ingredients]
    return f'mixture = {size} training rows because --dataset gives shares: {", ".join(given)}'


def _check_rows(one: Ingredient, available: int, count: int, size: int) -> None:
    if not available:
        raise ConfigError(
            f"--dataset '{one.word}': it has a share, but no row can be trained on. Correct its rows, or remove it."
        )
    if not count:
        raise ConfigError(
            f"--dataset '{one.word}': its share of a mixture of {size} rows is less than one row. Raise the share, or "
            'use more rows in total.'
        )


def _select_rows(part: Part, count: int, seed: int) -> None:
    """Select `count` training rows of a data set.

    If the data set has more than `count` rows, they are drawn at random. If it has fewer, rows are repeated. For
    example, if 7 rows are selected from 3, two rows are trained twice in an epoch, and a random one three times.
    """
    available = part.uses.count(TRAIN)
    if count < available:
        draw_uses([part], TRAIN, count, seed, drawn=TRAIN, rest=UNUSED)
        return

    part.passes = count // available
    chosen = set(random.Random(seed).sample(range(available), count % available))
    part.once_more = bytearray(len(part.uses))
    positions = (position for position, use in enumerate(part.uses) if use == TRAIN)
    for index, position in enumerate(positions):
        part.once_more[position] = index in chosen


def _described(one: Ingredient, available: int, size: int) -> str:
    count = one.part.trained_rows()
    if count < available:
        how = f'drawn from its {available} rows'
    elif count == available:
        how = 'all its rows'
    elif count % available == 0:
        how = f'{count // available} passes of its {available} rows'
    else:
        how = f'{count / available:.1f} passes of its {available} rows'
    share = 'no share' if one.share is None else f'{float(100 * one.share):g} % of {size}'
    return f'{one.part.name} {count} rows ({share}, {how})'


def take_turns(shares: Sequence[Fraction]) -> Iterator[int]:
    """Yield, without end, the index of the data set from which the next row is taken.

    For example, the shares 1/2 and 1/2 give 0, 1, 0, 1 and so on. After k rows, each data set has given k * share rows,
    with an error of less than one row. Shares that do not sum to 1 are scaled. The order depends only on the shares.
    """
    scale = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    whole = sum(weights)
    counts = [0] * len(shares)
    for step in itertools.count(1):
        # One more row of these sources is not too early. At least one source is in the list, because the counts sum to
        # step - 1. Of them, the one whose next row must come soonest is taken: this order misses no deadline.
        ready = [i for i, weight in enumerate(weights) if counts[i] * whole < weight * step]
        chosen = min(ready, key=lambda i: -(-(counts[i] + 1) * whole // weights[i]))
        counts[chosen] += 1
        yield chosen
