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


_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_MM_ALIGNMENT = 16  # bytes; what `torch.nn.functional.grouped_mm` asks of every stride
_FEW_ROWS = 256
"""Up to so many rows an accelerator computes what it will throw away rather than wait for the host."""
_LOOPED_DEVICES = ("cpu",)
"""Where a loop over the groups is as fast as `grouped_mm`, which is the same loop, and saves gathers and copies."""


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


_SLOTS: dict[tuple[tuple[tuple[int, ...], ...], int, torch.device, int], Tensor] = {}


def expert_slots(
    expert_ids: tuple[tuple[int, ...], ...], num_experts: int, device: torch.device, num_identity_experts: int = 0
) -> Tensor:
    """Sorting keys that put the pairs of frozen experts first, then the trained ones, then identity experts.

    Made once for each set of arguments.

    Args:
        expert_ids: the trained experts of each adapter, whose rows lie one adapter after another; there may be none.
        num_experts: `E`.
        device: of the result.
        num_identity_experts: experts that return their input, with the ids from `E` on.

    Returns:
        int64 `[adapters, E + identity experts]`: for an adapter's expert `E` + the place of its rows, for any other
        expert its id, for all identity experts `E + n`.
    """
    # A plain dict: the compiler would trace through `functools.lru_cache`.
    key = (expert_ids, num_experts, device, num_identity_experts)
    if key not in _SLOTS:
        # A tensor made in inference mode could not take part in a later training step.
        with torch.inference_mode(False):
            _SLOTS[key] = _make_slots(expert_ids, num_experts, num_identity_experts).to(device)
    return _SLOTS[key]


def _make_slots(expert_ids: tuple[tuple[int, ...], ...], num_experts: int, num_identity_experts: int) -> Tensor:
    num_trained = sum(map(len, expert_ids))
    slots = torch.arange(num_experts + num_identity_experts).repeat(len(expert_ids), 1)
    slots[:, num_experts:] = num_experts + num_trained
    first = num_experts
    for row, ids in zip(slots, expert_ids, strict=True):
        row[list(ids)] = first + torch.arange(len(ids))
        first += len(ids)
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
        trained: the effective weights of the `n` trained experts.
        frozen: the base's weights of all `E` experts.
        slots: a row of `expert_slots`, `[E + identity experts]`; with `adapter_of_token` one row for each adapter.
        body: what lies between the projections.
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

    rows = order.linear(hidden_states, frozen.up, trained.up, body.is_transposed, gather=True)
    if frozen.up_bias is not None and trained.up_bias is not None:
        rows = rows + order.of_rows(frozen.up_bias, trained.up_bias)
    rows = body.activation(rows)
    if trained.down_bias is None and body.post_expert_norm is None:
        output = order.linear_and_sum(rows, routed, frozen.down, trained.down, body.is_transposed)
    else:
        rows = order.linear(rows, frozen.down, trained.down, body.is_transposed)
        if frozen.down_bias is not None and trained.down_bias is not None:
            rows = rows + order.of_rows(frozen.down_bias, trained.down_bias)
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
        host_ends: `ends` as a list; None where it is not worth the host synchronisation, or not possible.
    """

    pairs: Tensor
    tokens: Tensor
    places: Tensor
    slots: Tensor
    ends: Tensor
    host_ends: list[int] | None

    def linear(
        self, inputs: Tensor, frozen: Tensor, trained: Tensor, is_transposed: bool, gather: bool = False
    ) -> Tensor:
        """Each row times the matrix of its group: `[R, in]`, or `[T, in]` with `gather`, to `[R, out]`."""
        tokens, places = (self.tokens, self.places) if gather else (None, None)
        inputs = inputs.to(frozen.dtype)
        return _Linear.apply(inputs, frozen, trained, tokens, places, self.ends, self.host_ends, is_transposed)

    def linear_and_sum(
        self, rows: Tensor, weights: Tensor, frozen: Tensor, trained: Tensor, is_transposed: bool
    ) -> Tensor:
        """`weighted_sum(linear(rows), weights)`, without keeping what is summed: `[R, in]` to `[T, out]`."""
        rows = rows.to(frozen.dtype)
        return _LinearAndSum.apply(
            rows,
            weights,
            frozen,
            trained,
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

    def of_rows(self, frozen: Tensor, trained: Tensor) -> Tensor:
        """A vector for each row, from `[E, ...]` and `[n, ...]` to `[R, ...]`; anything for rows in no group."""
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
    # One host synchronisation on an accelerator. A compiled graph has none: there it is up to the kernels.
    is_known = not torch.compiler.is_compiling() and (
        pairs.device.type in _LOOPED_DEVICES or pairs.shape[0] > _FEW_ROWS
    )
    return RowOrder(
        pairs=pairs,
        tokens=pairs // slot_of_pair.shape[1],
        places=torch.empty_like(pairs).scatter_(0, pairs, rows).view(slot_of_pair.shape),
        slots=slots,
        ends=ends,
        host_ends=ends.tolist() if is_known else None,
    )


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool = False) -> Tensor:
    """A linear layer whose weight changes from one group of rows to the next.

    Args:
        rows: `[R, in]`, group after group; cast to the weight's dtype.
        weight: `[G, out, in]`, or `[G, in, out]` if `is_transposed`. A group without rows gets a zero gradient.
        offsets: int32 `[G]`, the end of each group's rows; the last one is `R`.
        is_transposed: how the weight is stored.

    Returns:
        `[R, out]` in the weight's dtype.
    """
    return _Linear.apply(rows.to(weight.dtype), weight[:0].detach(), weight, None, None, offsets, None, is_transposed)


class _RowsWithDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, delta: Tensor) -> Tensor:
        ctx.dtype = delta.dtype
        rows = weight.index_select(0, ids)
        if rows.device.type != "cpu" or rows.dtype == delta.dtype:
            rows.add_(delta)
        else:
            # Here torch makes copies of mixed operands in the wider dtype: of one expert's they stay in the cache.
            for row, change in zip(rows.unbind(), delta.unbind(), strict=True):
                row.add_(change)
        return rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad_outputs[0].to(ctx.dtype)


class _Linear(torch.autograd.Function):
    """`RowOrder.linear`. Only the trained part of the inputs is needed again, and gathered again."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        frozen: Tensor,
        trained: Tensor,
        tokens: Tensor | None,
        places: Tensor | None,
        ends: Tensor,
        host_ends: list[int] | None,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(inputs if ctx.needs_input_grad[2] else None, frozen, trained, tokens, places, ends)
        ctx.host_ends, ctx.is_transposed = host_ends, is_transposed
        return _grouped_mm(inputs, tokens, frozen, trained, ends, host_ends, not is_transposed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, frozen, trained, tokens, places, ends = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_inputs = grad_trained = None
        if ctx.needs_input_grad[0]:
            grad_inputs = _grouped_mm(grad, None, frozen, trained, ends, ctx.host_ends, ctx.is_transposed)
            if places is not None:
                grad_inputs = _sum_rows(grad_inputs, places)
        if ctx.needs_input_grad[2]:
            part = _trained_part(frozen.shape[0], ends, ctx.host_ends)
            grad_trained = part.outer(part.rows(inputs, tokens), grad[part.span], ctx.is_transposed)
        return grad_inputs, None, grad_trained, None, None, None, None, None


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
        pairs: Tensor,
        tokens: Tensor,
        places: Tensor,
        ends: Tensor,
        host_ends: list[int] | None,
        is_transposed: bool,
    ) -> Tensor:
        is_needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(rows if is_needed else None, weights, frozen, trained, pairs, tokens, places, ends)
        ctx.host_ends, ctx.is_transposed = host_ends, is_transposed
        weight_of_row = weights.reshape(-1).index_select(0, pairs)[:, None]
        result = _grouped_mm(rows, None, frozen, trained, ends, host_ends, not is_transposed)
        # Rounded like the products of the base's implementations: a bit more or less sends tokens to other experts.
        result = result.to(torch.promote_types(result.dtype, weights.dtype))
        result *= weight_of_row
        return _sum_rows(result, places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, frozen, trained, pairs, tokens, places, ends = ctx.saved_tensors
        grad = grad_outputs[0].to(frozen.dtype).contiguous()
        weight_of_row = weights.reshape(-1).index_select(0, pairs)[:, None]
        grad_rows = grad_weights = grad_trained = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_rows = _grouped_mm(grad, tokens, frozen, trained, ends, ctx.host_ends, ctx.is_transposed)
            if ctx.needs_input_grad[1]:
                grad_of_row = (grad_rows * rows).sum(dim=1)
                grad_weights = grad_of_row.index_select(0, places.reshape(-1)).view(places.shape).to(weights.dtype)
            grad_rows *= weight_of_row
        if ctx.needs_input_grad[3]:
            part = _trained_part(frozen.shape[0], ends, ctx.host_ends)
            weighted = (rows[part.span] * weight_of_row[part.span]).to(rows.dtype)
            grad_trained = part.outer(weighted, part.rows(grad, tokens), ctx.is_transposed)
        return grad_rows, grad_weights, None, grad_trained, None, None, None, None, None, None


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

    def outer(self, inputs: Tensor, grads: Tensor, is_transposed: bool) -> Tensor:
        """The gradient of the trained weights, from the part's inputs `[S, in]` and gradients `[S, out]`."""
        left, right = (inputs, grads) if is_transposed else (grads, inputs)
        return _grouped_outer(left, right, self.bounds, self.host_bounds)


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


def _grouped_mm(
    inputs: Tensor,
    tokens: Tensor | None,
    frozen: Tensor,
    trained: Tensor,
    ends: Tensor,
    host_ends: list[int] | None,
    is_flipped: bool,
) -> Tensor:
    """Each row times the matrix of its group.

    Args:
        inputs: `[R, in]`, or `[T, in]` with `tokens`.
        tokens: int64 `[R]`, where in `inputs` each row comes from.
        frozen: `[E, in, out]`, or `[E, out, in]` if `is_flipped`.
        trained: `[n, in, out]`, or `[n, out, in]` if `is_flipped`.
        ends: int32 `[E + n]`.
        host_ends: the same as a list, or None.
        is_flipped: how the matrices are stored.

    Returns:
        `[R, out]`, zero for rows that are in no group.
    """
    if torch.compiler.is_compiling():
        return torch.ops.peft_esft.grouped_mm(inputs, tokens, frozen, trained, ends, is_flipped)
    if is_flipped:
        frozen, trained = frozen.transpose(1, 2), trained.transpose(1, 2)
    if _has_kernel(inputs, frozen):
        rows = inputs if tokens is None else inputs.index_select(0, tokens)
        if host_ends is None and rows.shape[0] <= _FEW_ROWS:
            return _few_rows_mm(rows, frozen, trained, ends)
        return _many_rows_mm(rows, frozen, trained, ends, ends.tolist() if host_ends is None else host_ends)
    return _loop_mm(inputs, tokens, frozen, trained, ends.tolist() if host_ends is None else host_ends)


def _many_rows_mm(rows: Tensor, frozen: Tensor, trained: Tensor, ends: Tensor, host_ends: list[int]) -> Tensor:
    """Two kernels on disjoint rows; the shorter result is copied into the longer one."""
    start, end = [0, *host_ends][frozen.shape[0]], host_ends[-1]
    if start > 0:
        # The kernel leaves rows behind the last end alone.
        result = torch.nn.functional.grouped_mm(rows, frozen, offs=ends[: frozen.shape[0]])
    else:
        result = rows.new_empty(rows.shape[0], frozen.shape[2])
    if end > start:
        offsets = ends[frozen.shape[0] :] - start
        result[start:end] = torch.nn.functional.grouped_mm(rows[start:end], trained, offs=offsets)
    result[end:] = 0
    return result


def _few_rows_mm(rows: Tensor, frozen: Tensor, trained: Tensor, ends: Tensor) -> Tensor:
    """Two kernels on all rows, of which the right results are chosen: nothing waits for the host.

    The first trained group takes in all frozen rows before it, whose results are thrown away.
    """
    result = torch.nn.functional.grouped_mm(rows, trained, offs=ends[frozen.shape[0] :])
    row = torch.arange(rows.shape[0], device=rows.device)[:, None]
    if frozen.shape[0] > 0:
        of_frozen = torch.nn.functional.grouped_mm(rows, frozen, offs=ends[: frozen.shape[0]])
        result = torch.where(row < ends[frozen.shape[0] - 1], of_frozen, result)
    return result.masked_fill_(row >= ends[-1], 0)


def _loop_mm(inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: list[int]) -> Tensor:
    """One group after the other, as torch's kernel for the CPU does. Of many rows each is gathered in its turn."""
    if tokens is not None and tokens.shape[0] <= _FEW_ROWS:
        inputs, tokens = inputs.index_select(0, tokens), None
    sources = inputs if tokens is None else tokens
    result = inputs.new_empty(sources.shape[0], frozen.shape[2])
    groups, sizes = _non_empty_groups(ends)
    sizes.append(sources.shape[0] - ends[-1])
    *targets, rest = result.split(sizes)
    with torch.autocast(inputs.device.type, enabled=False):
        for group, source, target in zip(groups, sources.split(sizes), targets, strict=False):
            rows = source if tokens is None else inputs.index_select(0, source)
            matrix = frozen[group] if group < frozen.shape[0] else trained[group - frozen.shape[0]]
            torch.mm(rows, matrix, out=target)
    rest.zero_()
    return result


def _grouped_outer(left: Tensor, right: Tensor, bounds: Tensor, host_bounds: list[int] | None) -> Tensor:
    """`left[group].T @ right[group]` for each group: `left [S, a]` and `right [S, b]` to `[n, a, b]`.

    Args:
        left: rows.
        right: rows.
        bounds: int32 `[n + 1]`, where the first group begins, and the end of each.
        host_bounds: the same as a list, or None.
    """
    if torch.compiler.is_compiling():
        return torch.ops.peft_esft.grouped_outer(left, right, bounds)
    has_kernel = _has_kernel(left, right) and left.shape[0] > 0
    if has_kernel and host_bounds is None and left.shape[0] <= _FEW_ROWS:
        # The rows before the first group make one group more, which is thrown away.
        return torch.nn.functional.grouped_mm(left.transpose(0, 1), right, offs=bounds)[1:]
    start, *ends = bounds.tolist() if host_bounds is None else host_bounds
    left, right = left[start : ends[-1]], right[start : ends[-1]]
    if has_kernel and left.shape[0] > 0:
        return torch.nn.functional.grouped_mm(left.transpose(0, 1), right, offs=bounds[1:] - start)
    groups, sizes = _non_empty_groups([end - start for end in ends])
    result = left.new_empty(len(ends), left.shape[1], right.shape[1])
    with torch.autocast(left.device.type, enabled=False):
        for group, own_left, own_right in zip(groups, left.split(sizes), right.split(sizes), strict=True):
            torch.mm(own_left.T, own_right, out=result[group])
    for group in set(range(len(ends))).difference(groups):
        result[group] = 0
    return result


def _has_kernel(left: Tensor, right: Tensor) -> bool:
    """True if `torch.nn.functional.grouped_mm` has a kernel for these operands that is better than a loop."""
    if left.device.type in _LOOPED_DEVICES or left.dtype not in _GROUPED_MM_DTYPES:
        return False
    if left.is_cuda and torch.cuda.get_device_capability(left.device) < (8, 0):
        return False
    sizes = (left.shape[-1], *right.shape[-2:]) if right.dim() == 3 else (left.shape[-1], right.shape[-1])
    if any(size * left.element_size() % _GROUPED_MM_ALIGNMENT for size in sizes):
        return False
    return all(operand.data_ptr() % _GROUPED_MM_ALIGNMENT == 0 for operand in (left, right))


def _non_empty_groups(ends: list[int]) -> tuple[list[int], list[int]]:
    """The groups that have rows, and how many each has."""
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    groups = [group for group, size in enumerate(sizes) if size]
    return groups, [sizes[group] for group in groups]


@torch.library.custom_op("peft_esft::grouped_mm", mutates_args=())
def _grouped_mm_op(
    inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: Tensor, is_flipped: bool
) -> Tensor:
    return _grouped_mm(inputs, tokens, frozen, trained, ends, None, is_flipped)


@_grouped_mm_op.register_fake
def _(
    inputs: Tensor, tokens: Tensor | None, frozen: Tensor, trained: Tensor, ends: Tensor, is_flipped: bool
) -> Tensor:
    return inputs.new_empty((inputs if tokens is None else tokens).shape[0], frozen.shape[1 if is_flipped else 2])


@torch.library.custom_op("peft_esft::grouped_outer", mutates_args=())
def _grouped_outer_op(left: Tensor, right: Tensor, bounds: Tensor) -> Tensor:
    return _grouped_outer(left, right, bounds, None)


@_grouped_outer_op.register_fake
def _(left: Tensor, right: Tensor, bounds: Tensor) -> Tensor:
    return left.new_empty(bounds.shape[0] - 1, left.shape[1], right.shape[1])
