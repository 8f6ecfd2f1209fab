"""Parts of a module with adapters, as code finds them that reads a weight, or calls a part, in place of the whole."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn


Substitutes = Callable[[], dict[str, Tensor]]
"""Gives the effective weights of a module by path; none if no adapter is active."""

Caller = Callable[..., Any]
"""Calls a module: `(module, substitutes, *args, **kwargs)`."""


class AdaptedPart:
    """A module with the active adapters' deltas: its call, its methods, its parameters and the modules in it.

    Everything else is the module's own, and so is what is set.
    """

    def __init__(self, module: nn.Module, substitutes: Substitutes, caller: Caller) -> None:
        vars(self).update(_module=module, _substitutes=substitutes, _caller=caller)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._caller(self._module, self._substitutes, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call: hooks of the module run too, as accelerate's must that bring its weights."""
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return part_of(self._module, name, getattr(self._module, name), self)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def parameter(self, name: str, value: Tensor) -> Tensor:
        """A parameter with the deltas on it, differentiable; `value` if there are none."""
        return self._substitutes().get(name, value)

    def child(self, name: str, module: nn.Module) -> AdaptedPart:
        """A module in this one."""

        def substitutes() -> dict[str, Tensor]:
            prefix = f"{name}."
            found = self._substitutes()
            return {path.removeprefix(prefix): value for path, value in found.items() if path.startswith(prefix)}

        return AdaptedPart(module, substitutes, self._caller)


def part_of(module: nn.Module, name: str, value: Any, adapted: AdaptedPart) -> Any:
    """An attribute of a module, with deltas if it has any to do with the parameters.

    Args:
        module: which one.
        name: of the attribute.
        value: the module's own.
        adapted: the module with deltas.
    """
    if isinstance(value, nn.Parameter):
        return adapted.parameter(name, value)
    if isinstance(value, nn.Module):
        return adapted.child(name, value)
    if isinstance(value, MethodType) and value.__self__ is module and not hasattr(nn.Module, name):
        return MethodType(value.__func__, adapted)
    return value
