"""Experts behind any other forward: their weights are substituted for the length of the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layer import ESFTLayer
from .mixed_batch import AdapterBatch


def call_with(module: nn.Module, substitutes: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Calls a module with other tensors in place of its parameters, which are given by path."""
    shadows: list[tuple[dict[str, Any], str, Any]] = []
    for path in substitutes:
        owner, _, name = path.rpartition(".")
        attributes = module.get_submodule(owner).__dict__
        if name in attributes:
            # FSDP (the first one) hides parameters behind plain attributes of the same name while a forward runs;
            # `functional_call` replaces the parameter, and the module would read the attribute.
            shadows.append((attributes, name, attributes.pop(name)))
    try:
        return torch.func.functional_call(module, substitutes, args, kwargs)
    finally:
        for attributes, name, value in shadows:
            attributes[name] = value


class SubstitutedExperts(ESFTLayer):
    """A container whose own forward runs with the effective weights in place of its parameters.

    Where experts are modules of their own, or a module is trained whole, only what is selected is replaced. Where all
    experts share a parameter, the whole parameter is written anew in each call, and its whole gradient too: correct,
    but slow.
    """

    def _adapted_forward(self, base_layer: nn.Module, adapter_names: list[str], *args: Any, **kwargs: Any) -> Any:
        ids = self.union_of_experts(adapter_names)
        substitutes: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            substitutes |= weight.substitutes(base_layer, ids, self.rows_for_forward(name, adapter_names))
        output = call_with(base_layer, substitutes, *args, **kwargs)
        return self._connected(output, adapter_names) if isinstance(output, Tensor) else output

    def _mixed_forward(self, base_layer: nn.Module, batch: AdapterBatch, *args: Any, **kwargs: Any) -> Tensor:
        # Once for each adapter, on the whole batch: nothing is known here of what lies between input and output.
        outputs = []
        for name in batch.adapters:
            names = self.adapters_here([name])
            outputs.append(
                self._adapted_forward(base_layer, names, *args, **kwargs) if names else base_layer(*args, **kwargs)
            )
        if not all(isinstance(output, Tensor) for output in outputs):
            raise NotImplementedError(
                f"{self.path} ({type(base_layer).__name__}) returns more than one tensor, so adapter_names cannot "
                "tell its samples apart; call the model once for each adapter, after set_adapter(name)"
            )
        adapter_of_row = batch.adapter_of_row(outputs[0].shape[0], outputs[0].device)
        rows = torch.arange(len(adapter_of_row), device=adapter_of_row.device)
        return torch.stack(outputs)[adapter_of_row, rows]

    def _connected(self, output: Tensor, adapter_names: list[str]) -> Tensor:
        """The output, as a function of all deltas: an expert that no token reaches gets a zero gradient, not None."""
        if not torch.is_grad_enabled():
            return output
        deltas = [
            d for name in adapter_names for weight in self.weight_names for d in self._delta_parameters(weight, name)
        ]
        nothing = sum(delta.flatten()[:0].sum() for delta in deltas if delta.requires_grad)
        return output + nothing.to(output.dtype) if isinstance(nothing, Tensor) else output
