"""Experts in fused parameters: the split forward for those with the standard flags, a compact twin for the others."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .containers import TWIN_CLASSES
from .functional import ExpertBody, ExpertWeights, split_experts_forward
from .layer import ESFTLayer


class FusedExperts(ESFTLayer):
    """Fused experts with the flags of `transformers.integrations.use_experts_implementation`."""

    def _adapted_forward(
        self, adapter_names: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        base = self.get_base_layer()
        output, pairs = split_experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            trained=self._weights({name: self.effective_rows(name, adapter_names) for name in self.weight_names}),
            frozen=self._weights({name: self._base_weight(name) for name in self.weight_names}),
            slots=self.slots(adapter_names, hidden_states.device),
            body=ExpertBody(
                activation=base._apply_gate if base.has_gate else base.act_fn,
                is_transposed=base.is_transposed,
                post_expert_norm=base.post_expert_norm if base.has_post_expert_norm else None,
            ),
        )
        self._count_pairs(adapter_names, pairs)
        return output

    def _weights(self, by_name: dict[str, Tensor]) -> ExpertWeights:
        return ExpertWeights(*(by_name[name] for name in self.weight_names))


class TwinExperts(FusedExperts):
    """Fused experts without the flags: their own class does the work.

    The pairs of trained experts go through a twin of the module, of the same class with `n` experts, whose weights
    are the effective rows; all other pairs through the base. Each pair is a call's token with a top_k of one, so
    neither module sees an expert id that it does not have, and no pair is computed twice.
    """

    def _adapted_forward(
        self, adapter_names: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        top_k = top_k_index.shape[1]
        index, weights = top_k_index.reshape(-1, 1), top_k_weights.reshape(-1, 1)
        ids = self.union_of_experts(adapter_names)
        slots = self.slots(adapter_names, index.device)
        # Ids from num_experts on have no weights here: identity experts, which the base computes.
        slot = torch.where(index < self.num_experts, slots[index.clamp(max=self.num_experts - 1)], len(ids))[:, 0]
        trained, frozen = (slot < len(ids)).nonzero()[:, 0], (slot >= len(ids)).nonzero()[:, 0]

        rows = {name: self.effective_rows(name, adapter_names) for name in self.weight_names}
        own = torch.func.functional_call(
            self._twin(len(ids)), rows, (hidden_states[trained // top_k], slot[trained, None], weights[trained])
        )
        others = self.base_layer(hidden_states[frozen // top_k], index[frozen], weights[frozen])
        # A sum over nothing ties each delta to the output: without tokens its gradient is zero, not None.
        own = own + sum(row.flatten()[:0].sum().to(own.dtype) for row in rows.values())
        per_pair = others.new_empty(index.shape[0], others.shape[1])
        per_pair = per_pair.index_copy(0, trained, own).index_copy(0, frozen, others)
        self._count_pairs(adapter_names, torch.bincount(slot[trained], minlength=len(ids)))
        return per_pair.view(-1, top_k, per_pair.shape[1]).sum(dim=1).to(hidden_states.dtype)

    def _twin(self, num_experts: int) -> nn.Module:
        """A module like the base with `num_experts` experts and no weights of its own."""
        base = self.get_base_layer()
        empty = {
            id(parameter): nn.Parameter(torch.empty(num_experts, *parameter.shape[1:], device="meta"), False)
            for parameter in base.parameters(recurse=False)
        }
        twin = copy.deepcopy(base, memo=empty)
        for attribute in TWIN_CLASSES[type(base).__name__]:
            setattr(twin, attribute, num_experts)
        # Hooks and a patched forward belong to the base alone.
        twin.__dict__.pop("forward", None)
        twin._forward_hooks.clear()
        twin._forward_pre_hooks.clear()
        return twin


LAYER_CLASSES: dict[str, type[FusedExperts]] = {"fused": FusedExperts, "twin": TwinExperts}
"""The layer for each kind of container."""
