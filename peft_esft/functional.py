"""The arithmetic of expert-specialized layers: plain tensors, no PEFT, no model.

Axes are spelled the same way everywhere: `T` tokens, `K` experts per token (top_k), `H` hidden size, `I` intermediate
size, `E` experts, `n` trained experts, `R` rows, one for each (token, expert) pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grouped import ends_on_host, grouped_mm, grouped_outer


@dataclass(frozen=True)
class ExpertWeights:
    """The fused weights of some experts.

    Attributes:
        up: `[experts, 2I, H]`, or `[experts, H, 2I]` if transposed; `I` in place of `2I` for experts without a gate.
        down: `[experts, H, I]`, or `[experts, I, H]` if transposed.
        up_bias: `[experts, 2I]` or None.
        down_bias: `[experts, H]` or None.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class ExpertBody:
    """What happens between and after an expert's two projections, the same for all experts of a container.

    Attributes:
        activation: maps the up projection's output `[R, 2I]` (`[R, I]` without a gate) to `[R, I]`.
        is_transposed: True if weights are stored `[experts, in, out]`.
        post_expert_norm: applied to the down projection's output `[R, H]` if given.
    """

    activation: Callable[[Tensor], Tensor]
    is_transposed: bool = False
    post_expert_norm: Callable[[Tensor], Tensor] | None = None


def default_gate(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    """The gate of `transformers.integrations.moe`: `activation(gate) * up`, `[R, 2I]` to `[R, I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def expert_slots(
    selections: Sequence[tuple[Sequence[int], int]], num_experts: int, num_rows: int, num_identity_experts: int = 0
) -> Tensor:
    """Sorting keys that put the pairs of frozen experts first, then the trained ones, then identity experts.

    Args:
        selections: for each adapter, the experts it trains, of which there may be none, and the place of its first
            row; further rows follow it.
        num_experts: `E`.
        num_rows: how many places there are, `n`.
        num_identity_experts: experts that return their input, with the ids from `E` on.

    Returns:
        int64 `[adapters, E + identity experts]`: for an adapter's expert `E` + the place of its row, for any other
        expert its id, for all identity experts `E + n`.
    """
    slots = torch.arange(num_experts + num_identity_experts).repeat(len(selections), 1)
    slots[:, num_experts:] = num_experts + num_rows
    for row, (ids, first) in zip(slots, selections, strict=True):
        row[list(ids)] = num_experts + first + torch.arange(len(ids))
    return slots


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
        dtype = torch.promote_types(total.dtype, delta.dtype)
        if positions is None:
            total = total.to(dtype) + delta.to(dtype)
        else:
            total = total.to(dtype).index_add(0, positions, delta.to(dtype))
    return total.to(rows.dtype)


def rows_with_delta(weight: Tensor, ids: Tensor, delta: Tensor) -> Tensor:
    """`add_deltas(weight[ids], [(None, delta)])`, with fewer copies.

    Args:
        weight: `[E, ...]`, a constant.
        ids: int64 `[n]`.
        delta: `[n, ...]`, no narrower than `weight`.

    Returns:
        `[n, ...]` in the dtype of `weight`.
    """
    return _RowsWithDelta.apply(weight, ids, delta)


def split_experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    trained: ExpertWeights,
    frozen: ExpertWeights,
    slots: Tensor,
    body: ExpertBody,
    trained_ids: Tensor | None = None,
    adapter_of_token: Tensor | None = None,
) -> Tensor:
    """Runs a mixture of experts in which a few experts are trained and all others are frozen.

    The (token, expert) pairs are sorted once by slot: frozen experts, trained ones, and experts that return their
    input, which few models have. Each row meets one matrix only, so no floating-point operation is done twice, and a
    weight gradient exists for the trained experts only: the frozen weights are constants here.

    Args:
        hidden_states: `[T, H]`.
        top_k_index: int64 `[T, K]`, expert ids.
        top_k_weights: `[T, K]`, what each expert's output is multiplied with.
        trained: the effective weights of the `n` trained experts, or their deltas.
        frozen: the base's weights of all `E` experts.
        slots: a row of `expert_slots`, `[E + identity experts]`; with `adapter_of_token` one row for each adapter.
        body: what lies between the projections.
        trained_ids: int64 `[n]`, which experts the deltas are of; None if `trained` has effective weights. Weights
            formed from deltas are not kept for the backward pass, but formed again.
        adapter_of_token: int64 `[T]`, if tokens have adapters of their own; `trained` then has all adapters' experts.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.
    """
    num_experts, num_trained = frozen.down.shape[0], trained.down.shape[0]
    slot_of_pair = slots[top_k_index] if adapter_of_token is None else slots[adapter_of_token[:, None], top_k_index]
    order = order_rows(slot_of_pair, num_experts + num_trained)
    identity, routed = None, top_k_weights
    if slots.shape[-1] > num_experts:
        identity = slot_of_pair == num_experts + num_trained
        routed = top_k_weights.masked_fill(identity, 0)

    rows = order.linear(hidden_states, frozen.up, trained.up, trained_ids, body.is_transposed, gather=True)
    if frozen.up_bias is not None and trained.up_bias is not None:
        rows = rows + order.of_rows(frozen.up_bias, trained.up_bias, trained_ids)
    rows = body.activation(rows)
    if trained.down_bias is None and body.post_expert_norm is None:
        output = order.linear_and_sum(rows, routed, frozen.down, trained.down, trained_ids, body.is_transposed)
    else:
        rows = order.linear(rows, frozen.down, trained.down, trained_ids, body.is_transposed)
        if frozen.down_bias is not None and trained.down_bias is not None:
            rows = rows + order.of_rows(frozen.down_bias, trained.down_bias, trained_ids)
        if body.post_expert_norm is not None:
            rows = body.post_expert_norm(rows)
        output = order.weighted_sum(rows, routed)
    if identity is not None:
        output = output + hidden_states * top_k_weights.masked_fill(~identity, 0).sum(dim=1, keepdim=True)
    return output.to(hidden_states.dtype)


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
        frozen: Tensor,
        trained: Tensor,
        trained_ids: Tensor | None,
        is_transposed: bool,
        gather: bool = False,
    ) -> Tensor:
        """Each row times the matrix of its group: `[R, in]`, or `[T, in]` with `gather`, to `[R, out]`."""
        tokens, places = (self.tokens, self.places) if gather else (None, None)
        inputs = inputs.to(frozen.dtype)
        return _Linear.apply(
            inputs, frozen, trained, trained_ids, tokens, places, self.ends, self.host_ends, is_transposed
        )

    def linear_and_sum(
        self,
        rows: Tensor,
        weights: Tensor,
        frozen: Tensor,
        trained: Tensor,
        trained_ids: Tensor | None,
        is_transposed: bool,
    ) -> Tensor:
        """`weighted_sum(linear(rows), weights)`, without keeping what is summed: `[R, in]` to `[T, out]`."""
        rows = rows.to(frozen.dtype)
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
        rows = rows * weights.reshape(-1).index_select(0, self.pairs)[:, None]
        return rows.index_select(0, self.places.reshape(-1)).view(*self.places.shape, rows.shape[1]).sum(dim=1)

    def of_rows(self, frozen: Tensor, trained: Tensor, trained_ids: Tensor | None) -> Tensor:
        """A vector for each row, from `[E, ...]` and `[n, ...]` to `[R, ...]`; anything for rows in no group."""
        if trained_ids is not None:
            trained = rows_with_delta(frozen, trained_ids, trained)
        by_slot = torch.cat([frozen, trained])
        return by_slot[self.slots.clamp(max=by_slot.shape[0] - 1)]


def order_rows(slot_of_pair: Tensor, num_groups: int) -> RowOrder:
    """Sorts pairs by slot.

    Args:
        slot_of_pair: int64 `[T, K]`.
        num_groups: `G`; pairs with this slot, the highest, belong to no group.
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
        host_ends=ends_on_host(ends, pairs.shape[0]),
    )


class _RowsWithDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, delta: Tensor) -> Tensor:
        ctx.dtype = delta.dtype
        return _sum_with_delta(weight, ids, delta)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad_outputs[0].to(ctx.dtype)


def _sum_with_delta(weight: Tensor, ids: Tensor, delta: Tensor) -> Tensor:
    rows = weight.index_select(0, ids)
    if rows.device.type != "cpu" or rows.dtype == delta.dtype:
        return rows.add_(delta)
    # Here torch makes copies of mixed operands in the wider dtype: of one expert's they stay in the cache.
    for row, change in zip(rows.unbind(), delta.unbind(), strict=True):
        row.add_(change)
    return rows


def _effective(frozen: Tensor, trained: Tensor, trained_ids: Tensor | None) -> Tensor:
    """The weights of the trained experts, from themselves or their deltas."""
    return trained if trained_ids is None else _sum_with_delta(frozen, trained_ids, trained)


class _Linear(torch.autograd.Function):
    """`RowOrder.linear`. Only the trained part of the inputs is needed again, and gathered again."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        frozen: Tensor,
        trained: Tensor,
        trained_ids: Tensor | None,
        tokens: Tensor | None,
        places: Tensor | None,
        ends: Tensor,
        host_ends: list[int] | None,
        is_transposed: bool,
    ) -> Tensor:
        kept = inputs if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, frozen, trained, trained_ids, tokens, places, ends)
        ctx.host_ends, ctx.is_transposed = host_ends, is_transposed
        weights = _effective(frozen, trained, trained_ids)
        return grouped_mm(inputs, tokens, frozen, weights, ends, host_ends, not is_transposed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, frozen, trained, trained_ids, tokens, places, ends = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_inputs = grad_trained = None
        if ctx.needs_input_grad[0]:
            weights = _effective(frozen, trained, trained_ids)
            grad_inputs = grouped_mm(grad, None, frozen, weights, ends, ctx.host_ends, ctx.is_transposed)
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
        frozen: Tensor,
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
        ctx.save_for_backward(kept, weights, frozen, trained, trained_ids, pairs, tokens, places, ends)
        ctx.host_ends, ctx.is_transposed = host_ends, is_transposed
        weight_of_row = weights.reshape(-1).index_select(0, pairs)[:, None]
        matrices = _effective(frozen, trained, trained_ids)
        result = grouped_mm(rows, None, frozen, matrices, ends, host_ends, not is_transposed)
        # Rounded like the products of the base's implementations: a bit more or less sends tokens to other experts.
        result = result.to(torch.promote_types(result.dtype, weights.dtype))
        result *= weight_of_row
        return _sum_rows(result, places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, frozen, trained, trained_ids, pairs, tokens, places, ends = ctx.saved_tensors
        grad = grad_outputs[0].to(frozen.dtype).contiguous()
        weight_of_row = weights.reshape(-1).index_select(0, pairs)[:, None]
        grad_rows = grad_weights = grad_trained = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            matrices = _effective(frozen, trained, trained_ids)
            grad_rows = grouped_mm(grad, tokens, frozen, matrices, ends, ctx.host_ends, ctx.is_transposed)
            if ctx.needs_input_grad[1]:
                grad_of_row = (grad_rows * rows).sum(dim=1)
                grad_weights = grad_of_row.index_select(0, places.reshape(-1)).view(places.shape).to(weights.dtype)
            grad_rows *= weight_of_row
        if ctx.needs_input_grad[3]:
            part = _trained_part(frozen.shape[0], ends, ctx.host_ends)
            weighted = (rows[part.span] * weight_of_row[part.span]).to(rows.dtype)
            grad_trained = part.outer(weighted, part.rows(grad, tokens), ctx.is_transposed, trained.dtype)
        return grad_rows, grad_weights, None, grad_trained, None, None, None, None, None, None, None


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
    bounds = torch.nn.functional.pad(ends, (1, 0))[num_frozen:]
    if host_ends is None:
        return _TrainedPart(slice(None), bounds, None)
    host_bounds = [0, *host_ends][num_frozen:]
    start = host_bounds[0]
    return _TrainedPart(slice(start, host_bounds[-1]), bounds - start, [bound - start for bound in host_bounds])


def _sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """`sum_k rows[places[t, k]]`, in a fixed order and rounded once: `[R, H]` to `[T, H]`."""
    if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16):
        # The kernel below rounds halves up here, and not to even.
        return rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[1]).sum(dim=1)
    return torch.nn.functional.embedding_bag(places, rows, mode="sum")
