"""Experts behind any other forward: their weights are substituted for the length of the call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.deltas import connected
from ..mixed_batch import AdapterBatch, current_batch
from .calls import AdapterCall
from .layer import ESFTLayer
from .parts import AdaptedPart, Substitutes, part_of


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

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module; with the deltas, since model code may read a weight and not call the module."""
        value = super().__getattr__(name)
        return value if name in self._modules else self.attribute(self.base_layer, name, value)

    @property
    def weight(self) -> Any:
        """The module's `weight` with the active adapters' deltas. `get_base_layer()` has the base's."""
        return self.attribute(self.base_layer, "weight", self.base_layer.weight)

    @property
    def bias(self) -> Any:
        """The module's `bias`, see `weight`."""
        return self.attribute(self.base_layer, "bias", self.base_layer.bias)

    def attribute(self, base_layer: nn.Module, name: str, value: Any) -> Any:
        """An attribute of `base_layer`, this layer's or one tied to it, as who reads it is to see it.

        Args:
            base_layer: the module.
            name: of the attribute.
            value: the module's own.

        Raises:
            ValueError: if it is one that deltas change, and the call under way has `adapter_names`.
        """
        if not isinstance(value, nn.Parameter | nn.Module | MethodType) or not self._changes_parts(name):
            return value
        adapted = AdaptedPart(base_layer, partial(self._effective_parameters, base_layer), self._call_part)
        return part_of(base_layer, name, value, adapted)

    def _changes_parts(self, name: str) -> bool:
        """True if a part of the module is not the base's own for a call under way, or outside of one.

        Raises:
            ValueError: if it depends on the sample.
        """
        batch = None if self._disable_adapters else current_batch()
        if batch is None:
            return self.current_call() is not None
        plan = batch.plans.get(self)
        if plan is not None and any(resident is not None for resident in plan.residents):
            raise ValueError(
                f"adapter_names is not supported by {self.path}: the model takes its {name} in place of calling it. "
                "Call the model once for each adapter, after set_adapter(name)"
            )
        return False

    def _effective_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        """The parameters of `base_layer` that deltas change, by path, with the deltas of the active adapters."""
        call = self.current_call()
        if call is None:
            return {}
        with alone(), self.at_hand(base_layer):
            return self._substitutes(base_layer, call.expert_ids, self.rows_for(call))

    def _call_part(self, module: nn.Module, substitutes: Substitutes, *args: Any, **kwargs: Any) -> Any:
        """Calls a module in the base layer; one thread after another."""
        with alone():
            values = substitutes()
            output = call_with(module, values, *args, **kwargs) if values else module(*args, **kwargs)
        call = self.current_call()
        if call is None or not isinstance(output, Tensor):
            return output
        return connected(output, self._deltas_of(call.key))

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
        return call_with(base_layer, self._substitutes(base_layer, expert_ids, rows), *args, **kwargs)

    def _substitutes(
        self, base_layer: nn.Module, expert_ids: tuple[int, ...], rows: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        substitutes: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            substitutes |= weight.substitutes(base_layer, expert_ids, rows[name])
        return substitutes

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
