"""Do two adapters get in each other's way? The experts that both train, and how alike their changes are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..tuner.layers.layer import ESFTLayer


@dataclass(frozen=True)
class SharedExpert:
    """An expert that two adapters train.

    Attributes:
        path: its container.
        expert: its id.
        cosine: of the two changes, all weights of the expert together; -1 if they undo each other.
    """

    path: str
    expert: int
    cosine: float


@dataclass(frozen=True)
class ConflictReport:
    """What two adapters have in common; `print` it.

    Attributes:
        adapters: their names.
        shared: the experts that both train, layer by layer.
        num_trained: experts that each trains.
        num_layers: containers that at least one trains.
    """

    adapters: tuple[str, str]
    shared: list[SharedExpert]
    num_trained: tuple[int, int]
    num_layers: int

    @property
    def shared_per_layer(self) -> float:
        """Shared experts a container, on average."""
        return len(self.shared) / max(1, self.num_layers)

    def __str__(self) -> str:
        first, second = self.adapters
        lines = [
            f"{first} trains {self.num_trained[0]} experts and {second} {self.num_trained[1]}; they share "
            f"{len(self.shared)}, {self.shared_per_layer:.2f} a layer"
        ]
        lines += [f"{shared.path} {shared.expert}: cosine {shared.cosine:+.2f}" for shared in self.shared]
        return "\n".join(lines)


@torch.no_grad()
def adapter_conflicts(model: nn.Module, first: str, second: str) -> ConflictReport:
    """Compares two adapters of a model, before they are combined or active together.

    Args:
        model: with both adapters.
        first: name of one.
        second: name of the other.

    Returns:
        The report.

    Raises:
        ValueError: if the model lacks one of them, or adapters are merged.

    Example:
        >>> print(adapter_conflicts(model, "law", "intent"))
    """
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    known = {name for layer in layers for name in layer.expert_ids}
    missing = [name for name in (first, second) if name not in known]
    if missing:
        raise ValueError(f"there are no ESFT adapters {missing}; there are {sorted(known)}")
    if any(layer.merged for layer in layers):
        raise ValueError("adapters are merged into the base; unmerge them before they are compared")
    ids = [{layer.path: layer.expert_ids.get(name, []) for layer in layers} for name in (first, second)]
    return ConflictReport(
        adapters=(first, second),
        shared=[shared for layer in layers for shared in _shared_experts(layer, first, second)],
        num_trained=(sum(map(len, ids[0].values())), sum(map(len, ids[1].values()))),
        num_layers=sum(bool(ids[0][layer.path] or ids[1][layer.path]) for layer in layers),
    )


def _shared_experts(layer: ESFTLayer, first: str, second: str) -> list[SharedExpert]:
    own, other = layer.expert_ids.get(first, []), layer.expert_ids.get(second, [])
    common = [expert for expert in own if expert in other]
    if not common:
        return []
    one, two = (_changes(layer, name, common) for name in (first, second))
    cosines = torch.nn.functional.cosine_similarity(one, two, dim=1).tolist()
    return [SharedExpert(layer.path, expert, cosine) for expert, cosine in zip(common, cosines, strict=True)]


def _changes(layer: ESFTLayer, adapter_name: str, experts: list[int]) -> Tensor:
    """An adapter's change of some experts, all weights one after another, float64 `[experts, ...]`."""
    places = [layer.expert_ids[adapter_name].index(expert) for expert in experts]
    rows = []
    for name, weight in layer.weights.items():
        delta = layer.get_delta_weight(adapter_name, name)
        if delta is None:
            delta = torch.zeros_like(weight.read(layer.get_base_layer(), layer.expert_ids[adapter_name]))
        rows.append(delta[places].flatten(1).double().cpu())
    return torch.cat(rows, dim=1)
