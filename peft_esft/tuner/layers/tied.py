"""Defines the layer for a module that shares its weights with an adapted one."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .layer import ESFTLayer
from .substituted import SubstitutedExperts


def update_tied_keys(model: nn.Module) -> None:
    """Has transformers find the weights that are tied where they are: in the base layers of wrapped modules.

    `PreTrainedModel.tie_weights`, which accelerate calls too, looks them up by the names in two attributes.
    """
    for part in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(part, attribute, None) if isinstance(part, PreTrainedModel) else None
            if isinstance(keys, dict):
                found = {_current_name(part, target): _current_name(part, source) for target, source in keys.items()}
                if found != keys:
                    setattr(part, attribute, found)


def _current_name(model: nn.Module, name: str) -> str:
    plain = name.replace(".base_layer.", ".")
    owner, _, leaf = plain.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:  # a pattern of names
        return name
    return f"{owner}.base_layer.{leaf}" if isinstance(module, ESFTLayer | TiedLayer) else plain


class TiedLayer(nn.Module, BaseTunerLayer):
    """A module that shares its weights with one that an `ESFTLayer` is around: the same deltas serve both.

    All state is the other layer's, so there is one delta to train, save and merge.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, source_layer: ESFTLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._source_layer = (source_layer,)  # in a tuple, so that it is not a submodule of this one

    @property
    def source_layer(self) -> ESFTLayer:
        """The layer that holds the deltas."""
        return self._source_layer[0]

    @property
    def active_adapters(self) -> list[str]:
        return self.source_layer.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return self.source_layer.disable_adapters

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        return self.source_layer.merged_adapters

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module stay visible through the wrapper."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "_source_layer") or name.startswith("__"):
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
        value, source = getattr(self.base_layer, name), self.source_layer
        return source.attribute(self.base_layer, name, value) if isinstance(source, SubstitutedExperts) else value

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """The source layer's state is this one's."""

    def enable_adapters(self, enabled: bool) -> None:
        """The source layer's state is this one's."""

    def delete_adapter(self, adapter_name: str) -> None:
        """The source layer's state is this one's."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """The source layer's merge changes these weights too."""

    def unmerge(self) -> None:
        """The source layer's unmerge changes these weights too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.source_layer.forward_through(self.base_layer, *args, **kwargs)

    def __repr__(self) -> str:
        return "esft." + super().__repr__()
