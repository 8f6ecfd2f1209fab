"""Rows of a base weight and the deltas on them: plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .frozen_store import Frozen


def add_deltas(rows: Tensor, deltas: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Adds the deltas of one or more adapters to rows of a base weight.

    The sum is taken in the wider of the dtypes and rounded once, so that updates smaller than the rounding of a
    half-precision base still add up.

    Args:
        rows: `[n, ...]`, rows of the base weight.
        deltas: pairs of positions and delta; `delta[i]` is added to `rows[positions[i]]`. Positions None means that
            the delta has exactly the rows' shape and order.

    Returns:
        `[n, ...]` in the dtype of `rows`.
    """
    total = rows
    for positions, delta in deltas:
        if positions is None:
            total = total + delta
        else:
            dtype = torch.promote_types(total.dtype, delta.dtype)
            total = total.to(dtype).index_add(0, positions, delta.to(dtype))
    return total.to(rows.dtype)


def rows_with_delta(weight: Frozen, ids: Tensor, delta: Tensor) -> Tensor:
    """`add_deltas(weight[ids], [(None, delta)])`, with fewer copies.

    Args:
        weight: `[E, ...]`, a constant.
        ids: int64 `[n]`.
        delta: `[n, ...]`, no narrower than `weight`.

    Returns:
        `[n, ...]` in the dtype of `weight`.
    """
    return _RowsWithDelta.apply(weight, ids, delta)


def connected(output: Tensor, deltas: Iterable[Tensor]) -> Tensor:
    """The output, as a function of all deltas: one that had no part in it gets a zero gradient, not None.

    Args:
        output: any tensor.
        deltas: those that require no gradient are passed over.

    Returns:
        Its values, unchanged.
    """
    if not torch.is_grad_enabled():
        return output
    nothing = sum(delta.flatten()[:0].sum() for delta in deltas if delta.requires_grad)
    # A difference, since -0.0 + 0.0 is 0.0.
    return output - nothing.to(output.dtype) if isinstance(nothing, Tensor) else output


class _RowsWithDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Frozen, ids: Tensor, delta: Tensor) -> Tensor:
        return _sum_with_delta(weight, ids, delta)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad_outputs[0]  # autograd casts it to the delta's dtype


def _sum_with_delta(weight: Frozen, ids: Tensor, delta: Tensor) -> Tensor:
    # On a GPU, `index_select` copies few large rows at a third of the speed of the index.
    rows = weight[ids] if isinstance(weight, Tensor) and ids.device.type != "cpu" else weight.index_select(0, ids)
    if rows.device.type != "cpu" or rows.dtype == delta.dtype:
        return rows.add_(delta)
    # Here torch makes copies of mixed operands in the wider dtype: of one expert's they stay in the cache.
    for place, change in enumerate(delta.unbind()):
        rows[place].add_(change)
    return rows


def effective_weights(frozen: Frozen, trained: Tensor, trained_ids: Tensor | None) -> Tensor:
    """The weights of the trained experts, from themselves or their deltas."""
    return trained if trained_ids is None else _sum_with_delta(frozen, trained_ids, trained)
