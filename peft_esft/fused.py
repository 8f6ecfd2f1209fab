"""Experts in fused parameters: the split forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .functional import ExpertBody, ExpertWeights, default_gate, expert_slots, split_experts_forward
from .layer import ESFTLayer
from .mixed_batch import AdapterBatch
from .weights import StackedWeight, expert_index


class FusedExperts(ESFTLayer):
    """Fused experts: one module with parameters `[E, ...]` behind `(hidden_states, top_k_index, top_k_weights)`.

    All implementations of `transformers.integrations.moe` compute the same function; with an active adapter this layer
    takes their place. Without one it calls the module, whichever implementation that is set to.
    """

    def prepare(self, adapter_names: list[str]) -> None:
        """Makes the index tables of a forward pass: found in place, they are no reason to compile a model again."""
        super().prepare(adapter_names)
        self._slots([self.union_of_experts(adapter_names)], self._base_parameter(self.weight_names[0]).device)

    def _adapted_forward(
        self,
        base_layer: Any,
        adapter_names: list[str],
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        return split_experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=self._by_name({name: self.rows_for_forward(name, adapter_names) for name in self.weight_names}),
            frozen=self._by_name({name: weight.whole(base_layer) for name, weight in self._stacked_weights()}),
            slots=self._slots([self.union_of_experts(adapter_names)], hidden_states.device)[0],
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
        # The rows of all adapters lie one after another, whichever the batch has: what changes from batch to batch is
        # an index table. Adapters without experts here, and the base, have a row of the table that names none.
        names = list(self.expert_ids)
        table = self._slots([*self.expert_ids.values(), []], hidden_states.device)
        rows = expert_index(
            tuple(names.index(name) if name in names else len(names) for name in batch.adapters), table.device
        )
        return split_experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=self._by_name({name: self.rows_of_each(name, names) for name in self.weight_names}),
            frozen=self._by_name({name: weight.whole(base_layer) for name, weight in self._stacked_weights()}),
            slots=table[rows],
            body=self._body(base_layer),
            adapter_of_token=batch.adapter_of_row(hidden_states.shape[0], table.device),
        )

    def _slots(self, expert_ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        return expert_slots(tuple(map(tuple, expert_ids)), self.num_experts, device, self.num_identity_experts)

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
