"""Experts behind any other forward: their weights are substituted for the length of the call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from .calls import AdapterCall
from .deltas import connected
from .layer import ESFTLayer
from .mixed_batch import AdapterBatch


_substituting = RLock()
"""Held while a module may run whose parameters are substituted, which other threads would see."""


def alone() -> AbstractContextManager[Any]:
    """Has calls of modules whose parameters may be substituted wait for those of other threads."""
    return nullcontext() if torch.compiler.is_compiling() else _substituting


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

    def forward_through(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """See `ESFTLayer.forward_through`; one thread after another."""
        with alone():
            return super().forward_through(base_layer, *args, **kwargs)

    def _adapted_forward(self, base_layer: nn.Module, call: AdapterCall, *args: Any, **kwargs: Any) -> Any:
        output = self._substituted_forward(base_layer, call.expert_ids, self.rows_for(call), *args, **kwargs)
        return connected(output, self._deltas_of(call.key)) if isinstance(output, Tensor) else output

    def _substituted_forward(
        self, base_layer: nn.Module, expert_ids: tuple[int, ...], rows: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        substitutes: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            substitutes |= weight.substitutes(base_layer, expert_ids, rows[name])
        return call_with(base_layer, substitutes, *args, **kwargs)

    def _mixed_forward(self, base_layer: nn.Module, batch: AdapterBatch, *args: Any, **kwargs: Any) -> Any:
        plan = batch.plans.get(self)
        if plan is None:
            return base_layer(*args, **kwargs)
        # Once for each adapter, on the whole batch: nothing is known here of what lies between input and output.
        outputs = [
            base_layer(*args, **kwargs)
            if resident is None
            else self._substituted_forward(base_layer, resident.expert_ids, resident.rows, *args, **kwargs)
            for resident in plan.residents
        ]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise NotImplementedError(
                f"{self.path} ({type(base_layer).__name__}) returns more than one tensor, so adapter_names cannot "
                "tell its samples apart; call the model once for each adapter, after set_adapter(name)"
            )
        adapter_of_row = batch.adapter_of_row(outputs[0], self, self.path)
        rows = torch.arange(len(adapter_of_row), device=adapter_of_row.device)
        return torch.stack(outputs)[adapter_of_row, rows]
