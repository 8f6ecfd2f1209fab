"""Experts in fused parameters: the split forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...moe.weights import StackedWeight
from ...ops.split_forward import ExpertBody, ExpertWeights, default_gate, expert_slots, split_experts_forward
from ..mixed_batch import AdapterBatch
from .calls import AdapterCall
from .layer import ESFTLayer


class FusedExperts(ESFTLayer):
    """Fused experts: one module with parameters `[E, ...]` behind `(hidden_states, top_k_index, top_k_weights)`.

    All implementations of `transformers.integrations.moe` compute the same function; with an active adapter this layer
    takes their place. Without one it calls the module, whichever implementation that is set to.
    """

    def _adapted_forward(
        self,
        base_layer: Any,
        call: AdapterCall,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        weights, are_deltas = self.weights_for(call)
        assert call.slots is not None
        return split_experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=self._by_name(weights),
            trained_ids=call.index.to(hidden_states.device) if are_deltas else None,
            frozen=self._by_name({name: weight.whole(base_layer) for name, weight in self._stacked_weights()}),
            slots=call.slots.to(hidden_states.device)[0],
            body=self._body(base_layer),
        )

    def _mixed_forward(
        self,
        base_layer: Any,
        batch: AdapterBatch,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        plan = batch.plans.get(self)
        if plan is None or not plan.bank:
            return base_layer(hidden_states, top_k_index, top_k_weights)
        assert plan.slots is not None
        return split_experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=self._by_name(plan.bank),
            frozen=self._by_name({name: weight.whole(base_layer) for name, weight in self._stacked_weights()}),
            slots=plan.slots.to(hidden_states.device),
            body=self._body(base_layer),
            adapter_of_token=batch.adapter_of_row(hidden_states, self, self.path),
        )

    def _slots(self, selections: Sequence[tuple[Sequence[int], int]], num_rows: int) -> Tensor:
        slots = expert_slots(selections, self.num_experts, num_rows, self.num_identity_experts)
        return slots.to(self._table_device())

    def _stacked_weights(self) -> list[tuple[str, StackedWeight]]:
        """The weights by name; those of fused experts are all stacked."""
        return [(name, weight) for name, weight in self.weights.items() if isinstance(weight, StackedWeight)]

    def _by_name(self, by_name: dict[str, Tensor]) -> ExpertWeights:
        return ExpertWeights(*(by_name[name] for name in self.weight_names))

    def _body(self, base: Any) -> ExpertBody:
        if not self.layout.has_gate:
            activation = base.act_fn
        else:
            activation = base._apply_gate if hasattr(base, "_apply_gate") else partial(default_gate, base.act_fn)
        return ExpertBody(
            activation=activation,
            is_transposed=self.layout.is_transposed,
            post_expert_norm=base.post_expert_norm if self.layout.has_post_expert_norm else None,
        )
