"""Sorts the (token, expert) pairs of a batch by weight matrix, and multiplies in that order, forward and backward.

Axes are those of `split_forward.py`: `T` tokens, `K` experts per token, `E` experts, `n` trained experts, `R` rows,
one for each (token, expert) pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .deltas import effective_weights, rows_with_delta
from .frozen_store import Frozen, keep_for_backward
from .grouped_mm import ends_on_host, grouped_mm, grouped_outer


@dataclass(frozen=True)
class RowOrder:
    """The (token, expert) pairs in the order of their slots: `R` rows in `G` groups, one group for each weight matrix.

    Attributes:
        pairs: int64 `[R]`, the pair of each row; pair `t * K + k` is the `k`-th expert of token `t`.
        tokens: int64 `[R]`, the token of each row.
        places: int64 `[T, K]`, the row of each pair.
        slots: int64 `[R]`, the slot of each row.
        ends: int32 `[G]`, the end of each group's rows. Rows behind the last one belong to no group.
        host_ends: `ends` as a list; None where the host does not know them.
    """

    pairs: Tensor
    tokens: Tensor
    places: Tensor
    slots: Tensor
    ends: Tensor
    host_ends: list[int] | None

    def linear(
        self,
        inputs: Tensor,
        frozen: Frozen,
        trained: Tensor,
        trained_ids: Tensor | None,
        is_transposed: bool,
        gather: bool = False,
    ) -> Tensor:
        """Each row times the matrix of its group: `[R, in]`, or `[T, in]` with `gather`, to `[R, out]`."""
        tokens, places = (self.tokens, self.places) if gather else (None, None)
        inputs = inputs.to(frozen.dtype)
        if not torch.is_grad_enabled():
            # `apply` alone takes as long as a product of few rows.
            return _product(inputs, tokens, frozen, trained, trained_ids, self.ends, self.host_ends, not is_transposed)
        return _Linear.apply(
            inputs, frozen, trained, trained_ids, tokens, places, self.ends, self.host_ends, is_transposed
        )

    def linear_and_sum(
        self,
        rows: Tensor,
        weights: Tensor,
        frozen: Frozen,
        trained: Tensor,
        trained_ids: Tensor | None,
        is_transposed: bool,
    ) -> Tensor:
        """`weighted_sum(linear(rows), weights)`, without keeping what is summed: `[R, in]` to `[T, out]`."""
        rows = rows.to(frozen.dtype)
        if not torch.is_grad_enabled():
            products = _product(rows, None, frozen, trained, trained_ids, self.ends, self.host_ends, not is_transposed)
            return _weighted_sum(products, _weight_of_row(weights, self.pairs), self.places)
        return _LinearAndSum.apply(
            rows,
            weights,
            frozen,
            trained,
            trained_ids,
            self.pairs,
            self.tokens,
            self.places,
            self.ends,
            self.host_ends,
            is_transposed,
        )

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sums each token's rows `[R, H]`, multiplied with its weights `[T, K]`: `[T, H]`."""
        rows = rows * _weight_of_row(weights, self.pairs)
        return rows.index_select(0, self.places.reshape(-1)).view(*self.places.shape, rows.shape[1]).sum(dim=1)

    def of_rows(self, frozen: Tensor, trained: Tensor, trained_ids: Tensor | None) -> Tensor:
        """A vector for each row, from `[E, ...]` and `[n, ...]` to `[R, ...]`; anything for rows in no group."""
        if trained_ids is not None:
            trained = rows_with_delta(frozen, trained_ids, trained)
        by_slot = torch.cat([frozen, trained])
        return by_slot[self.slots.clamp(max=by_slot.shape[0] - 1)]


def order_rows(slot_of_pair: Tensor, num_groups: int, dtype: torch.dtype) -> RowOrder:
    """Sorts pairs by slot.

    Args:
        slot_of_pair: int64 `[T, K]`.
        num_groups: `G`; pairs with this slot, the highest, belong to no group.
        dtype: of the matrices.
    """
    slots, pairs = torch.sort(slot_of_pair.reshape(-1), stable=True)
    rows = torch.arange(pairs.shape[0], device=pairs.device)
    groups = torch.arange(num_groups, device=pairs.device)
    ends = torch.searchsorted(slots, groups, right=True, out_int32=True)
    return RowOrder(
        pairs=pairs,
        tokens=pairs // slot_of_pair.shape[1],
        places=torch.empty_like(pairs).scatter_(0, pairs, rows).view(slot_of_pair.shape),
        slots=slots,
        ends=ends,
        host_ends=ends_on_host(ends, pairs.shape[0], dtype),
    )


class _Linear(torch.autograd.Function):
    """`RowOrder.linear`. Only the trained part of the inputs is needed again, and gathered again."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        frozen: Frozen,
        trained: Tensor,
        trained_ids: Tensor | None,
        tokens: Tensor | None,
        places: Tensor | None,
        ends: Tensor,
        host_ends: list[int] | None,
        is_transposed: bool,
    ) -> Tensor:
        kept = inputs if ctx.needs_input_grad[2] else None
        constant = keep_for_backward(ctx, frozen)
        ctx.save_for_backward(kept, constant, trained, trained_ids, tokens, places, ends)
        ctx.host_ends, ctx.is_transposed = host_ends, is_transposed
        return _product(inputs, tokens, frozen, trained, trained_ids, ends, host_ends, not is_transposed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        inputs, constant, trained, trained_ids, tokens, places, ends = ctx.saved_tensors
        frozen = constant if ctx.store is None else ctx.store
        grad = grad_outputs[0].contiguous()
        grad_inputs = grad_trained = None
        if ctx.needs_input_grad[0]:
            grad_inputs = _product(grad, None, frozen, trained, trained_ids, ends, ctx.host_ends, ctx.is_transposed)
            if places is not None:
                grad_inputs = _sum_rows(grad_inputs, places)
        if ctx.needs_input_grad[2]:
            part = _trained_part(frozen.shape[0], ends, ctx.host_ends)
            own_grad = grad[part.span]
            grad_trained = part.outer(part.rows(inputs, tokens), own_grad, ctx.is_transposed, trained.dtype)
        return grad_inputs, None, grad_trained, None, None, None, None, None, None


class _LinearAndSum(torch.autograd.Function):
    """`RowOrder.linear_and_sum`.

    The gradient of a routing weight is the product of the output's gradient with a row `y = W x` of the result. It is
    computed as `(W^T grad) x`, from what the input's gradient needs anyway, so that `y` is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        frozen: Frozen,
        trained: Tensor,
        trained_ids: Tensor | None,
        pairs: Tensor,
        tokens: Tensor,
        places: Tensor,
        ends: Tensor,
        host_ends: list[int] | None,
        is_transposed: bool,
    ) -> Tensor:
        is_needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        kept = rows if is_needed else None
        constant = keep_for_backward(ctx, frozen)
        ctx.save_for_backward(kept, weights, constant, trained, trained_ids, pairs, tokens, places, ends)
        ctx.host_ends, ctx.is_transposed = host_ends, is_transposed
        products = _product(rows, None, frozen, trained, trained_ids, ends, host_ends, not is_transposed)
        return _weighted_sum(products, _weight_of_row(weights, pairs), places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        rows, weights, constant, trained, trained_ids, pairs, tokens, places, ends = ctx.saved_tensors
        frozen = constant if ctx.store is None else ctx.store
        grad = grad_outputs[0].to(frozen.dtype).contiguous()
        weight_of_row = _weight_of_row(weights, pairs)
        grad_rows = grad_weights = grad_trained = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_rows = _product(grad, tokens, frozen, trained, trained_ids, ends, ctx.host_ends, ctx.is_transposed)
            if ctx.needs_input_grad[1]:
                grad_of_row = (grad_rows * rows).sum(dim=1)
                grad_weights = grad_of_row.index_select(0, places.reshape(-1)).view(places.shape)
            grad_rows *= weight_of_row
        if ctx.needs_input_grad[3]:
            part = _trained_part(frozen.shape[0], ends, ctx.host_ends)
            weighted = (rows[part.span] * weight_of_row[part.span]).to(rows.dtype)
            grad_trained = part.outer(weighted, part.rows(grad, tokens), ctx.is_transposed, trained.dtype)
        return grad_rows, grad_weights, None, grad_trained, None, None, None, None, None, None, None


def _product(
    inputs: Tensor,
    tokens: Tensor | None,
    frozen: Frozen,
    trained: Tensor,
    trained_ids: Tensor | None,
    ends: Tensor,
    host_ends: list[int] | None,
    is_flipped: bool,
) -> Tensor:
    """`grouped_mm` with the effective weights of the trained experts."""
    weights = effective_weights(frozen, trained, trained_ids)
    return grouped_mm(inputs, tokens, frozen, weights, ends, host_ends, is_flipped)


def _weight_of_row(weights: Tensor, pairs: Tensor) -> Tensor:
    """The routing weight of each row: `[T, K]` to `[R, 1]`."""
    return weights.reshape(-1).index_select(0, pairs)[:, None]


def _refuse_second_derivative() -> None:
    """Refuses a backward pass that is to be differentiated again.

    torch's `once_differentiable` is not enough: where an input is reached on another way too, as around experts by the
    residual connection, autograd passes over its error and returns a part of the second derivative.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "second derivatives (create_graph=True) are not defined for experts with an active adapter. Merge the "
            "adapter first (merge_adapter, or merge_and_unload): the model's own experts then run"
        )


@dataclass(frozen=True)
class _TrainedPart:
    """The rows of the trained groups; all rows where the host does not know which they are.

    Attributes:
        span: where they lie.
        bounds: int32 `[n + 1]`, where in `span` the first group begins, and the end of each.
        host_bounds: the same as a list, or None.
    """

    span: slice
    bounds: Tensor
    host_bounds: list[int] | None

    def rows(self, values: Tensor, tokens: Tensor | None) -> Tensor:
        """The part of `values`, `[R, ...]` or by `tokens` `[T, ...]`."""
        return values[self.span] if tokens is None else values.index_select(0, tokens[self.span])

    def outer(self, inputs: Tensor, grads: Tensor, is_transposed: bool, dtype: torch.dtype) -> Tensor:
        """The gradient of the trained weights, from the part's inputs `[S, in]` and gradients `[S, out]`."""
        left, right = (inputs, grads) if is_transposed else (grads, inputs)
        return grouped_outer(left, right, self.bounds, self.host_bounds, dtype)


def _trained_part(num_frozen: int, ends: Tensor, host_ends: list[int] | None) -> _TrainedPart:
    # The first trained group begins where the last frozen one ends.
    bounds = ends[num_frozen - 1 :]
    if host_ends is None:
        return _TrainedPart(slice(None), bounds, None)
    start, *own_ends = host_ends[num_frozen - 1 :]
    return _TrainedPart(slice(start, own_ends[-1]), bounds - start, [0, *(end - start for end in own_ends)])


def _weighted_sum(rows: Tensor, weight_of_row: Tensor, places: Tensor) -> Tensor:
    """`_sum_rows(rows * weight_of_row)`, which writes to `rows`."""
    # Rounded like the products of the base's implementations: a bit more or less sends tokens to other experts.
    rows = rows.to(torch.promote_types(rows.dtype, weight_of_row.dtype))
    rows *= weight_of_row
    return _sum_rows(rows, places)


def _sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """`sum_k rows[places[t, k]]`, in a fixed order and rounded once: `[R, H]` to `[T, H]`."""
    if rows.device.type != "cpu" or rows.dtype in (torch.bfloat16, torch.float16):
        # The kernel below rounds halves up on the CPU, and not to even; on a GPU it takes twice as long.
        return rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[1]).sum(dim=1)
    return torch.nn.functional.embedding_bag(places, rows, mode="sum")
