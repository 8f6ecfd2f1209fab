"""The arithmetic of expert-specialized layers: plain tensors, no PEFT, no model.

Axes are spelled the same way everywhere: `T` tokens, `K` experts per token (top_k), `H` hidden size, `I` intermediate
size, `E` experts, `n` trained experts, `R` rows, one for each (token, expert) pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_MM_ALIGNMENT = 16  # bytes; what `torch.nn.functional.grouped_mm` asks of every stride


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


@lru_cache(maxsize=4096)
def expert_slots(
    expert_ids: tuple[int, ...], num_experts: int, device: torch.device, num_identity_experts: int = 0
) -> Tensor:
    """Sorting keys that put the pairs of trained experts first, then the frozen ones, then identity experts.

    Made once for each set of arguments.

    Returns:
        int64 `[E + identity experts]`: for a trained expert its position in `expert_ids`, for any other expert `e` the
        value `n + e`, for all identity experts `n + E`.
    """
    # A tensor made in inference mode could not take part in a later training step.
    with torch.inference_mode(False):
        slots = torch.arange(len(expert_ids), len(expert_ids) + num_experts + num_identity_experts)
        slots.clamp_(max=len(expert_ids) + num_experts)
        slots[list(expert_ids)] = torch.arange(len(expert_ids))
        return slots.to(device)


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


def split_experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    trained: ExpertWeights,
    frozen: ExpertWeights,
    slots: Tensor,
    body: ExpertBody,
) -> Tensor:
    """Runs a mixture of experts in which a few experts are trained and all others are frozen.

    The (token, expert) pairs are sorted once by slot, trained experts first. The rows of the first part go through
    `trained`, those of the second through `frozen`; a third, which few models have, is that of experts that return
    their input. No floating-point operation is done twice, and a weight gradient exists for the trained experts only.

    Args:
        hidden_states: `[T, H]`.
        top_k_index: int64 `[T, K]`, expert ids.
        top_k_weights: `[T, K]`, what each expert's output is multiplied with.
        trained: the effective weights of the `n` trained experts.
        frozen: the base's weights of all `E` experts.
        slots: from `expert_slots`.
        body: what lies between the projections.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.
    """
    num_tokens, top_k = top_k_index.shape
    num_trained, num_experts = trained.down.shape[0], frozen.down.shape[0]
    sorted_slots, pairs = torch.sort(slots[top_k_index.reshape(-1)], stable=True)
    counts = torch.zeros(num_trained + num_experts + 1, dtype=torch.int64, device=pairs.device)
    counts = counts.index_add(0, sorted_slots, torch.ones_like(sorted_slots))
    sizes = counts.split([num_trained, num_experts, 1])
    # One host synchronisation on an accelerator: the parts differ in length from batch to batch.
    pairs_of_part = pairs.split(torch.stack([size.sum() for size in sizes]).tolist())

    first_row = 0
    outputs = []
    for part, weights, group_sizes, first_slot in zip(
        pairs_of_part, (trained, frozen, None), sizes, (0, num_trained, 0), strict=True
    ):
        rows = hidden_states[part // top_k]
        if weights is not None:
            expert_of_row = sorted_slots[first_row : first_row + part.shape[0]] - first_slot
            offsets = torch.cumsum(group_sizes, 0, dtype=torch.int32)
            rows = expert_mlp(rows, weights, offsets, expert_of_row, body)
        outputs.append(rows * top_k_weights.reshape(-1)[part, None])
        first_row += part.shape[0]
    # Back in the order of the tokens, then a plain sum over top_k: deterministic, unlike adding rows up by index.
    per_pair = torch.empty(pairs.shape[0], hidden_states.shape[-1], dtype=outputs[0].dtype, device=pairs.device)
    for part, output in zip(pairs_of_part, outputs, strict=True):
        per_pair = per_pair.index_copy(0, part, output.to(per_pair.dtype))
    return per_pair.view(num_tokens, top_k, hidden_states.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def expert_mlp(
    rows: Tensor, weights: ExpertWeights, offsets: Tensor, expert_of_row: Tensor, body: ExpertBody
) -> Tensor:
    """The experts' feed-forward network on rows sorted by expert.

    Args:
        rows: `[R, H]`.
        weights: of `G` experts.
        offsets: int32 `[G]`, the end of each expert's rows.
        expert_of_row: int64 `[R]`, used only where there are biases.
        body: what lies between the projections.

    Returns:
        `[R, H]`, not yet multiplied by the routing weights.
    """
    rows = grouped_linear(rows, weights.up, offsets, body.is_transposed)
    if weights.up_bias is not None:
        rows = rows + weights.up_bias[expert_of_row]
    rows = grouped_linear(body.activation(rows), weights.down, offsets, body.is_transposed)
    if weights.down_bias is not None:
        rows = rows + weights.down_bias[expert_of_row]
    return rows if body.post_expert_norm is None else body.post_expert_norm(rows)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool = False) -> Tensor:
    """A linear layer whose weight changes from one group of rows to the next.

    Unlike the fallback of `transformers.integrations.moe`, it never computes the gradient of a weight that does not
    require one; a group without rows gets a zero gradient.

    Args:
        rows: `[R, in]`, group after group; cast to the weight's dtype.
        weight: `[G, out, in]`, or `[G, in, out]` if `is_transposed`.
        offsets: int32 `[G]`, the end of each group's rows; the last one is `R`.
        is_transposed: how the weight is stored.

    Returns:
        `[R, out]` in the weight's dtype.
    """
    return _GroupedLinear.apply(rows.to(weight.dtype), weight, offsets, is_transposed)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool) -> Tensor:
        # The rows are needed for the weight's gradient alone: those of frozen experts are not kept.
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, offsets)
        ctx.is_transposed = is_transposed
        return _grouped_mm(rows, weight if is_transposed else weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = _grouped_mm(grad, weight.transpose(1, 2) if ctx.is_transposed else weight, offsets)
        if ctx.needs_input_grad[1]:
            left, right = (rows, grad) if ctx.is_transposed else (grad, rows)
            grad_weight = _grouped_outer(left, right, offsets)
        return grad_rows, grad_weight, None, None


def _grouped_mm(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """`rows [R, in]` times `matrices [G, in, out]`, group by group: `[R, out]`."""
    if _has_kernel(rows, matrices):
        return torch.nn.functional.grouped_mm(rows, matrices, offs=offsets)
    result = rows.new_empty(rows.shape[0], matrices.shape[2])
    with torch.autocast(rows.device.type, enabled=False):
        for group, (start, end) in _non_empty_groups(offsets):
            torch.mm(rows[start:end], matrices[group], out=result[start:end])
    return result


def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """`left[group].T @ right[group]` of `left [R, a]` and `right [R, b]` for each group: `[G, a, b]`."""
    if _has_kernel(left, right) and left.shape[0] > 0:
        return torch.nn.functional.grouped_mm(left.transpose(0, 1), right, offs=offsets)
    result = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    with torch.autocast(left.device.type, enabled=False):
        for group, (start, end) in _non_empty_groups(offsets):
            torch.mm(left[start:end].T, right[start:end], out=result[group])
    return result


def _has_kernel(left: Tensor, right: Tensor) -> bool:
    """True if `torch.nn.functional.grouped_mm` takes these operands."""
    if left.dtype not in _GROUPED_MM_DTYPES:
        return False
    if left.is_cuda and torch.cuda.get_device_capability(left.device) < (8, 0):
        return False
    sizes = (left.shape[-1], *right.shape[-2:]) if right.dim() == 3 else (left.shape[-1], right.shape[-1])
    if any(size * left.element_size() % _GROUPED_MM_ALIGNMENT for size in sizes):
        return False
    return all(operand.data_ptr() % _GROUPED_MM_ALIGNMENT == 0 for operand in (left, right))


def _non_empty_groups(offsets: Tensor) -> list[tuple[int, tuple[int, int]]]:
    ends = offsets.tolist()
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    return [(group, (start, end)) for group, (start, end) in enumerate(bounds) if end > start]
