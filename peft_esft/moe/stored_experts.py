"""Defines the class of fused experts whose weights are kept in few bits, and gives it to plain experts."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.split_forward import (
    ExpertBody,
    ExpertWeights,
    FrozenWeights,
    default_gate,
    expert_slots,
    split_experts_forward,
)
from .architectures import ExpertsLayout
from .stored_rows import STORED, StoredRows
from .weights import StackedWeight, fused_weights


uncompiled_split_forward = torch.compiler.disable(split_experts_forward)
"""A compiled graph cannot take a store in: it breaks here."""


class StoredExperts(nn.Module):
    """Mixed into the class of a fused experts module of which weights are `StoredRows`.

    Its forward pass is the split forward without trained experts, whichever implementation transformers is set to. It
    keeps no matrix for the backward pass.
    """

    esft_layout: ExpertsLayout

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made on demand, and cannot be found by its name.
        return _new_stored, (type(self).__mro__[2],), self.__dict__

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Runs the experts: `[T, H]`, int64 `[T, K]` and `[T, K]` to `[T, H]`."""
        layout = self.esft_layout
        weights = fused_weights(self, layout.has_gate, layout.has_bias)
        none = [weight.read(self, []) for weight in weights]
        num_experts = weights[0].num_experts
        num_identity = getattr(self, layout.identity_experts) if layout.identity_experts else 0
        slots = expert_slots([((), 0)], num_experts, 0, num_identity)[0].to(hidden_states.device)
        output: Tensor = uncompiled_split_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=ExpertWeights(*none),
            frozen=frozen_weights(weights, self),
            slots=slots,
            body=expert_body(self, layout),
        )
        return output


def frozen_weights(weights: Iterable[StackedWeight], module: nn.Module) -> FrozenWeights:
    """The weights of fused experts, in the order of `fused_weights`, as the split forward takes them."""
    whole: list[Any] = [weight.whole(module) for weight in weights]
    return FrozenWeights(*whole)


def expert_body(module: Any, layout: ExpertsLayout) -> ExpertBody:
    """What lies between and after the projections of a fused experts module."""
    if not layout.has_gate:
        activation = module.act_fn
    else:
        activation = module._apply_gate if hasattr(module, "_apply_gate") else partial(default_gate, module.act_fn)
    return ExpertBody(
        activation=activation,
        is_transposed=layout.is_transposed,
        post_expert_norm=module.post_expert_norm if layout.has_post_expert_norm else None,
    )


def install(module: Any, layout: ExpertsLayout, weight_name: str, stored: StoredRows) -> None:
    """Puts a stored weight in place of a module's parameter, and gives the module the class that reads it."""
    if weight_name in module._parameters:
        del module._parameters[weight_name]
    module.add_module(STORED[weight_name], stored)
    module.esft_layout = layout
    if not isinstance(module, StoredExperts):
        module.__class__ = _stored_class(cast(Hashable, type(module)))


@functools.cache
def _stored_class(plain: Any) -> type[nn.Module]:
    return type(f"Stored{plain.__name__}", (StoredExperts, plain), {"__module__": plain.__module__})


def _new_stored(plain: Any) -> nn.Module:
    stored = _stored_class(plain)
    return stored.__new__(stored)
