"""Computes the forward pass of fused experts of which some are trained and the rest are frozen.

Axes are spelled the same way everywhere: `T` tokens, `K` experts per token (top_k), `H` hidden size, `I` intermediate
size, `E` experts, `n` trained experts, `R` rows, one for each (token, expert) pair.

The two products and their gradients are in `grouped_linear.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .frozen_store import Frozen
from .grouped_linear import order_rows


@dataclass(frozen=True)
class FrozenWeights:
    """The fused weights of all experts, which are constants.

    Attributes:
        up: `[experts, 2I, H]`, or `[experts, H, 2I]` if transposed; `I` in place of `2I` for experts without a gate.
        down: `[experts, H, I]`, or `[experts, I, H]` if transposed.
        up_bias: `[experts, 2I]` or None.
        down_bias: `[experts, H]` or None.
    """

    up: Frozen
    down: Frozen
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class ExpertWeights(FrozenWeights):
    """The same of some experts, as tensors."""

    up: Tensor
    down: Tensor


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
    selections: Sequence[tuple[Sequence[int], int]], num_experts: int, num_rows: int, num_identity_experts: int
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
    for adapter, (ids, first) in enumerate(selections):
        slots[adapter, list(ids)] = num_experts + first + torch.arange(len(ids))
    return slots


def split_experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    trained: ExpertWeights,
    frozen: FrozenWeights,
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
    order = order_rows(slot_of_pair, num_experts + num_trained, frozen.up.dtype)
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
