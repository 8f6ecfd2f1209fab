"""Modules that share their weights with an adapted one."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer import ESFTLayer
from .substituted import SubstitutedExperts


class TiedLayer(nn.Module, BaseTunerLayer):
    """A module that shares its weights with one that an `ESFTLayer` is around: the same deltas serve both.

    All state is the other layer's, so there is one delta to train, save and merge.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, leader: ESFTLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._leader = (leader,)  # in a tuple, so that it is no submodule of this one

    @property
    def leader(self) -> ESFTLayer:
        """The layer that holds the deltas."""
        return self._leader[0]

    @property
    def active_adapters(self) -> list[str]:
        return self.leader.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return self.leader.disable_adapters

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        return self.leader.merged_adapters

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module stay visible through the wrapper."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "_leader"):
                raise
            return self._attribute(name)

    @property
    def weight(self) -> Any:
        """The module's `weight` with the active adapters' deltas."""
        return self._attribute("weight")

    @property
    def bias(self) -> Any:
        """The module's `bias`, see `weight`."""
        return self._attribute("bias")

    def _attribute(self, name: str) -> Any:
        value = getattr(self.base_layer, name)
        leader = self.leader
        return leader.attribute(self.base_layer, name, value) if isinstance(leader, SubstitutedExperts) else value

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of its own to set."""

    def enable_adapters(self, enabled: bool) -> None:
        """Nothing of its own to switch."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Nothing of its own to delete."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """The other layer's merge changes these weights too."""

    def unmerge(self) -> None:
        """The other layer's unmerge changes these weights too."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module."""
        return self.get_base_layer()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.leader.forward_through(self.base_layer, *args, **kwargs)

    def __repr__(self) -> str:
        return "esft." + super().__repr__()
