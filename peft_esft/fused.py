"""Experts in fused parameters: the split forward."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .functional import ExpertBody, ExpertWeights, default_gate, split_experts_forward
from .layer import ESFTLayer


class FusedExperts(ESFTLayer):
    """Fused experts: one module with parameters `[E, ...]` behind `(hidden_states, top_k_index, top_k_weights)`.

    All implementations of `transformers.integrations.moe` compute the same function; with an active adapter this layer
    takes their place. Without one it calls the module, whichever implementation that is set to.
    """

    def _adapted_forward(
        self, adapter_names: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        output, pairs = split_experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=self._weights({name: self.rows_for_forward(name, adapter_names) for name in self.weight_names}),
            frozen=self._weights({name: self._base_weight(name)[: self.num_experts] for name in self.weight_names}),
            slots=self.slots(adapter_names, hidden_states.device),
            body=self._body(),
        )
        self._count_pairs(adapter_names, pairs)
        return output

    def _weights(self, by_name: dict[str, Tensor]) -> ExpertWeights:
        return ExpertWeights(*(by_name[name] for name in self.weight_names))

    def _body(self) -> ExpertBody:
        base: Any = self.get_base_layer()
        if not self.layout.has_gate:
            activation = base.act_fn
        else:
            activation = base._apply_gate if hasattr(base, "_apply_gate") else partial(default_gate, base.act_fn)
        return ExpertBody(
            activation=activation,
            is_transposed=self.layout.is_transposed,
            post_expert_norm=base.post_expert_norm if self.layout.has_post_expert_norm else None,
        )


LAYER_CLASSES: dict[str, type[ESFTLayer]] = {"fused": FusedExperts}
"""The layer for each kind of container."""
