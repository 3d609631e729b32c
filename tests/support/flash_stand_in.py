"""Stands in for torch's flash-attention operators, which exist on GPUs only.

The stand-ins are registered for the CPU under the names of the real operators. So torch checks the arguments against
the signatures of the real ones. They compute by definition, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


def _rows(ends: torch.Tensor) -> Iterator[slice]:
    edges = ends.tolist()
    for start, end in pairwise(edges):
        yield slice(start, end)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Return the scores (H, Q, K) of one row (T, H, D). Keys that are not seen have the score -inf."""
    scores = torch.einsum('qhd,khd->hqk', query.double(), key.double()) * scale
    position = torch.arange(len(query))
    hidden = position > position[:, None]
    if window >= 0:
        hidden |= position < position[:, None] - window
    return scores.masked_fill(hidden, -torch.inf)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int) -> None:
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    assert {x.stride(-1) for x in (query, key, value)} == {1}
    assert ends.dtype == torch.int32 and int(ends[0]) == 0 and int(ends[-1]) == len(query) == len(key) == len(value)
    assert int(ends.diff().max()) == longest


def _forward(
    query: Any, key: Any, value: Any, ends: Any, key_ends: Any, longest: int, longest_key: int, dropout: float,
    is_causal: bool, debug: bool, *, scale: float, window_size_left: int, window_size_right: int, **unused: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    _check(query, key, value, ends, longest)
    assert (dropout, is_causal, debug, window_size_right, longest_key) == (0.0, True, False, 0, longest)
    out = torch.full(query.shape, torch.nan, dtype=torch.double)
    log_sum = torch.full((query.shape[1], len(query)), torch.nan, dtype=torch.double)
    repeats = query.shape[1] // key.shape[1]
    for row in _rows(ends):
        many_keys, many_values = (x[row].repeat_interleave(repeats, 1) for x in (key, value))
        scores = _scores(query[row], many_keys, scale, window_size_left)
        out[row] = torch.einsum('hqk,khd->qhd', scores.softmax(-1), many_values.double())
        log_sum[:, row] = scores.logsumexp(-1)
    exact = torch.promote_types(query.dtype, torch.float32)
    state = torch.zeros(2, dtype=torch.uint64)
    return out.to(query.dtype), log_sum.to(exact), state, state[0].clone(), query.new_empty(0)


def _backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, log_sum: Any, ends: Any, key_ends: Any, longest: int,
    longest_key: int, dropout: float, is_causal: bool, state: Any, unused: Any, *, scale: float,
    window_size_left: int, window_size_right: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Compute like the kernel: the weights from `log_sum`, and the mean gradient from `out`."""
    _check(query, key, value, ends, longest)
    assert grad.stride(-1) == out.stride(-1) == 1 and log_sum.shape == (query.shape[1], len(query))
    found = [torch.full(x.shape, torch.nan, dtype=torch.double) for x in (query, key, value)]
    groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
    for row in _rows(ends):
        many_keys, many_values = (x[row].repeat_interleave(repeats, 1).double() for x in (key, value))
        weights = (_scores(query[row], many_keys, scale, window_size_left) - log_sum[:, row, None].double()).exp()
        out_grad = grad[row].double()
        mean = (out_grad * out[row].double()).sum(-1).t()[..., None]
        slopes = weights * (torch.einsum('qhd,khd->hqk', out_grad, many_values) - mean)
        found[0][row] = torch.einsum('hqk,khd->qhd', slopes, many_keys) * scale
        by_head = torch.einsum('hqk,qhd->khd', slopes, query[row].double()) * scale
        found[1][row] = by_head.unflatten(1, (groups, repeats)).sum(2)
        found[2][row] = torch.einsum('hqk,qhd->khd', weights, out_grad).unflatten(1, (groups, repeats)).sum(2)
    return tuple(x.to(query.dtype) for x in found)


@contextmanager
def flash_operators(*, factor: float = 1.0) -> Iterator[list[torch.Size]]:
    """A context in which the operators exist on the CPU. Yields the shapes of the queries that they were given.

    With a `factor` other than 1, the output is wrong by this factor.
    """
    calls: list[torch.Size] = []

    def forward(query: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        calls.append(query.shape)
        out, *rest = _forward(query, *args, **kwargs)
        return (out * factor, *rest)

    library = torch.library.Library('aten', 'IMPL', 'CPU')
    library.impl('_flash_attention_forward', forward)
    library.impl('_flash_attention_backward', _backward)
    try:
        yield calls
    finally:
        library._destroy()
