"""Defines the layer for modules of any other kind: it replaces their weights for the length of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...moe.architectures import SHARED_EXPERTS
from ...ops.deltas import connected
from ..mixed_batch import AdapterBatch, is_stateless
from .layer import ESFTLayer
from .offload import is_offloaded
from .records import ActiveAdapters


_substituting = RLock()
"""Held while a module may run whose parameters are substituted, which other threads would see."""


def substitution_lock() -> AbstractContextManager[Any]:
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


class AdaptedPart:
    """A module with the active adapters' deltas: its call, its methods, its weights and its parts.

    Model code that reads a weight, or calls a part, in place of calling the whole gets one. Everything else is the
    module's own, and so is what is set.

    Args:
        module: the module.
        substitutes: gives the effective weights of the module by path; none if no adapter is active.
        caller: calls a module, `(module, substitutes, *args, **kwargs)`.
    """

    def __init__(
        self, module: nn.Module, substitutes: Callable[[], dict[str, Tensor]], caller: Callable[..., Any]
    ) -> None:
        vars(self).update(_module=module, _substitutes=substitutes, _caller=caller)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._caller(self._module, self._substitutes, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call: hooks of the module run too, as accelerate's must that bring its weights."""
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self.part(name, getattr(self._module, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def part(self, name: str, value: Any) -> Any:
        """An attribute of the module, whose own one is `value`; with deltas if it has to do with the weights."""
        if isinstance(value, nn.Parameter):
            return self._substitutes().get(name, value)
        if isinstance(value, nn.Module):
            return AdaptedPart(value, partial(self._substitutes_below, f"{name}."), self._caller)
        if isinstance(value, MethodType) and value.__self__ is self._module and not hasattr(nn.Module, name):
            return MethodType(value.__func__, self)
        return value

    def _substitutes_below(self, prefix: str) -> dict[str, Tensor]:
        found = self._substitutes()
        return {path.removeprefix(prefix): value for path, value in found.items() if path.startswith(prefix)}


class SubstitutedExperts(ESFTLayer):
    """An experts module whose own forward runs with the effective weights in place of its parameters.

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
        """An attribute of `base_layer`, this layer's or one tied to it, with the active adapters' deltas.

        Args:
            base_layer: the module.
            name: of the attribute.
            value: the module's own.

        Raises:
            ValueError: if it is one that deltas change, and the call that runs has `adapter_names`.
        """
        if not isinstance(value, nn.Parameter | nn.Module | MethodType) or not self._changes_parts(name):
            return value
        part = AdaptedPart(base_layer, partial(self._effective_parameters, base_layer), self._call_part)
        return part.part(name, value)

    def _changes_parts(self, name: str) -> bool:
        """True if a part of the module is not the base's own for the call that runs, or outside of one.

        Raises:
            ValueError: if it depends on the sample.
        """
        batch = self.batch()
        if batch is None:
            return self.active() is not None
        if batch.rows.get(self) is not None:
            raise ValueError(
                f"adapter_names is not supported by {self.path}: the model takes its {name} in place of calling it. "
                "Call the model once for each adapter, after set_adapter(name)"
            )
        return False

    def _check_is_loaded(self) -> None:
        """Refuses an offloaded module: accelerate would load its weights over the substitutes.

        Raises:
            NotImplementedError: naming the module.
        """
        if self.active() is None and self.batch() is None:
            return
        base = self.get_base_layer()
        if next(iter(self.weights.values())).parameters(base)[0].is_meta and is_offloaded(base):
            raise NotImplementedError(
                f"{self.path} ({type(base).__name__}) was offloaded after the adapter was attached. Only fused "
                "experts can have adapters while they are offloaded; keep this module on a device (device_map), or "
                "merge the adapter before the model is offloaded"
            )

    def _effective_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        """The parameters of `base_layer` that deltas change, by path, with the deltas of the active adapters."""
        active = self.active()
        if active is None:
            return {}
        with substitution_lock(), self.onloaded(active.names, base_layer):
            return self._substitutes(base_layer, active.expert_ids, self.selected_rows(active), active.index)

    def _call_part(
        self, module: nn.Module, substitutes: Callable[[], dict[str, Tensor]], *args: Any, **kwargs: Any
    ) -> Any:
        """Calls a module in the base layer; one thread after another."""
        self._check_is_loaded()
        with substitution_lock():
            values = substitutes()
            output = call_with(module, values, *args, **kwargs) if values else module(*args, **kwargs)
        active = self.active()
        if active is None or not isinstance(output, Tensor):
            return output
        return connected(output, self._deltas_of(active.names))

    def forward_through(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """See `ESFTLayer.forward_through`; one thread after another."""
        self._check_is_loaded()
        with substitution_lock():
            return super().forward_through(base_layer, *args, **kwargs)

    def _adapted_forward(self, base_layer: nn.Module, active: ActiveAdapters, *args: Any, **kwargs: Any) -> Any:
        substitutes = self._substitutes(base_layer, active.expert_ids, self.selected_rows(active), active.index)
        output = call_with(base_layer, substitutes, *args, **kwargs)
        return connected(output, self._deltas_of(active.names)) if isinstance(output, Tensor) else output

    def _substitutes(
        self,
        base_layer: nn.Module,
        expert_ids: tuple[int, ...],
        rows: dict[str, Tensor],
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        substitutes: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            substitutes |= weight.substitutes(base_layer, expert_ids, rows[name], index)
        return substitutes

    def _mixed_forward(self, base_layer: nn.Module, batch: AdapterBatch, *args: Any, **kwargs: Any) -> Any:
        # Once for each adapter, on the whole batch: nothing is known here of what lies between input and output.
        mixed = batch.rows[self]
        outputs = [
            call_with(base_layer, self._substitutes(base_layer, ids, mixed.of(place)), *args, **kwargs)
            if ids
            else base_layer(*args, **kwargs)
            for place, ids in enumerate(mixed.expert_ids)
        ]
        adapter_of_row = batch.adapter_of_row(outputs[0], self, self.path)
        rows = torch.arange(len(adapter_of_row), device=adapter_of_row.device)
        return torch.stack(outputs)[adapter_of_row, rows]

    def check_mixes(self, model: nn.Module, adapters: Sequence[str]) -> None:
        """Refuses `adapter_names` for modules that cannot be called once for each adapter, see `ESFTLayer`."""
        self._check_is_loaded()
        base: Any = self.get_base_layer()
        is_shared = SHARED_EXPERTS.fullmatch(self.path.rpartition(".")[2]) is not None
        reason = None
        if self.kind == "stacked":
            reason = "does not keep a batch's tokens in order"
        elif isinstance(base, nn.ModuleList | nn.ModuleDict) and not overrides_forward(base):
            reason = "is called expert by expert"
        elif self.kind == "module" and len(adapters) > 1 and not (is_shared or is_stateless(base, model)):
            reason = "may keep a state or take rows that are no samples, so it cannot be called once for each adapter"
        if reason is not None:
            raise ValueError(
                f"adapter_names is not supported by {self.path}: {type(base).__name__} {reason}. Call the model once "
                "for each adapter, after set_adapter(name)"
            )


def overrides_forward(module: nn.Module) -> bool:
    """True if a list or dict of modules can be called."""
    return type(module).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)
