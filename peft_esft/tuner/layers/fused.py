"""Defines the layer for experts in fused parameters, whose forward pass is the split forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, partial
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from ...moe.stored_experts import expert_body, frozen_weights, uncompiled_split_forward
from ...moe.weights import StackedWeight, StoredWeight
from ...ops.split_forward import ExpertWeights, split_experts_forward
from ..mixed_batch import AdapterBatch
from .layer import ESFTLayer
from .records import ActiveAdapters


class FusedExperts(ESFTLayer):
    """Fused experts: one module with parameters `[E, ...]` behind `(hidden_states, top_k_index, top_k_weights)`.

    All implementations of `transformers.integrations.moe` compute the same function; with an active adapter this layer
    takes their place. Without one it calls the module, whichever implementation that is set to.
    """

    def _adapted_forward(self, base_layer: Any, active: ActiveAdapters, *args: Any, **kwargs: Any) -> Tensor:
        weights, are_deltas = self.selected_weights(active)
        split = partial(self._split, base_layer, weights, active.slots[0], active.index if are_deltas else None, None)
        return self._call(base_layer, split, *args, **kwargs)

    def _mixed_forward(self, base_layer: Any, batch: AdapterBatch, *args: Any, **kwargs: Any) -> Tensor:
        mixed = batch.rows[self]
        split = partial(self._split, base_layer, mixed.rows, mixed.slots, None, batch)
        return self._call(base_layer, split, *args, **kwargs)

    def _call(self, base_layer: Any, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return _with_hooks(base_layer, forward, *args, **kwargs)

    def _split(
        self,
        base: Any,
        weights: dict[str, Tensor],
        slots: Tensor,
        trained_ids: Tensor | None,
        batch: AdapterBatch | None,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        device = hidden_states.device
        stacked = {name: weight for name, weight in self.weights.items() if isinstance(weight, StackedWeight)}
        is_stored = any(isinstance(weight, StoredWeight) for weight in stacked.values())
        forward = uncompiled_split_forward if is_stored else split_experts_forward
        output: Tensor = forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=ExpertWeights(*(weights[name] for name in self.weight_names)),
            trained_ids=None if trained_ids is None else trained_ids.to(device, non_blocking=True),
            frozen=frozen_weights(stacked.values(), base),
            slots=slots.to(device, non_blocking=True),
            body=expert_body(base, self.layout),
            adapter_of_token=None if batch is None else batch.adapter_of_row(hidden_states, self, self.path),
        )
        return output


def _with_hooks(module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls `forward` in place of a module's own forward pass; the module's hooks run as they do around that one."""
    # torch has no public way to ask for hooks of all kinds.
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not any(hooks):
        return forward(*args, **kwargs)
    twin = object.__new__(_twin_class(cast(Hashable, type(module))))
    twin.__dict__ = module.__dict__  # the same, as hooks such as ZeRO-3's write to the module that they are given
    object.__setattr__(twin, "esft_forward", forward)
    return twin(*args, **kwargs)


@cache
def _twin_class(module_class: Any) -> Any:
    """A class of modules with a forward pass of their own, that is not in `__dict__`."""
    own = {"__slots__": ("esft_forward",), "forward": property(attrgetter("esft_forward"))}
    return type(module_class.__name__, (module_class,), own)
