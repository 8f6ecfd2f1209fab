"""An independent model of what adapters are: plain dense weights, computed anew whenever they are asked for.

It shares nothing with the package: adapters are lists of expert ids and tensors, and the model is a plain one whose
forward pass runs with the dense weights in place of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


WeightKey = tuple[str, str]
"""A container's path and the name of one of its weights."""

LISTED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass
class DenseAdapter:
    """What an adapter consists of.

    Attributes:
        experts: ids by container.
        tensors: for each weight one delta `[n, ...]`, two factors A and B of it, or, if `is_frozen`, the rows.
        scaling: what the product of factors is multiplied with.
        scale: what the delta is multiplied with beside.
        is_frozen: True if it holds rows and no deltas.
    """

    experts: dict[str, list[int]]
    tensors: dict[WeightKey, list[Tensor]]
    scaling: float = 1.0
    scale: float = 1.0
    is_frozen: bool = False

    def to(self, dtype: torch.dtype) -> DenseAdapter:
        return self.map(lambda tensor: tensor.to(dtype))

    def map(self, function) -> DenseAdapter:
        return replace(self, tensors={key: [function(t) for t in own] for key, own in self.tensors.items()})


def read_adapter(model: nn.Module, name: str, experts: dict[str, list[int]], **settings) -> DenseAdapter:
    """The tensors that a wrapped model holds of an adapter, by the names that they have in its state."""
    tensors: dict[WeightKey, list[Tensor]] = {}
    for key, value in sorted(model.state_dict().items()):
        if ".esft_" in key and key.endswith(f".{name}"):
            path, _, weight = key.removesuffix(f".{name}").removeprefix("base_model.model.").rpartition(".esft_")
            for suffix in ("_A", "_B", "_rows"):
                weight = weight.removesuffix(suffix)
            tensors.setdefault((path, weight), []).append(value.detach().clone())
    own = {path: ids for path, ids in experts.items() if any(path == place for place, _ in tensors)}
    return DenseAdapter(own, tensors, **settings)


@dataclass
class DenseModel:
    """A plain model, and the adapters over it.

    Attributes:
        model: never written to but by a change of dtype.
        adapters: by name.
        active: names of those that a forward pass adds.
        is_enabled: False if it adds none.
        merged: names of those that are merged, in this order.
        merged_weights: what the parameters are as long as some are merged.
    """

    model: nn.Module
    adapters: dict[str, DenseAdapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    is_enabled: bool = True
    merged: list[str] = field(default_factory=list)
    merged_weights: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.adapters = {name: adapter.to(dtype) for name, adapter in self.adapters.items()}
        self.merged_weights = {name: weight.to(dtype) for name, weight in self.merged_weights.items()}

    def merge(self, names: Sequence[str]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self.merged]
        self.merged = self.merged + new
        # The others stay as they are, rounded to what the dtype was when they were merged.
        weights = self.weights(self.merged)
        self.merged_weights = {**self.merged_weights, **{name: weights[name] for name in self.weights(new)}}

    def unmerge(self) -> None:
        self.merged, self.merged_weights = [], {}

    def parameters(self) -> dict[str, Tensor]:
        """What the base's parameters are by now."""
        return {**dict(self.model.named_parameters()), **self.merged_weights}

    def current_weights(self) -> dict[str, Tensor]:
        """What a forward pass has in place of the parameters."""
        if self.merged or not self.is_enabled:
            return self.merged_weights
        return self.weights(self.active)

    def __call__(self, weights: dict[str, Tensor], **inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, weights, kwargs=inputs)[0]

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters that some adapters change, with their deltas added."""
        names = list(dict.fromkeys(names))
        changed: dict[str, Tensor] = {}
        for path, weight in dict.fromkeys(key for name in names for key in self.adapters[name].tensors):
            here = [self.adapters[name] for name in names if path in self.adapters[name].experts]
            for expert in dict.fromkeys(expert for adapter in here for expert in adapter.experts[path]):
                places = self.places(path, weight, expert)
                base = [self.model.get_parameter(name) for name, _ in places]
                row = torch.cat([p if place is None else p[place] for p, (_, place) in zip(base, places, strict=True)])
                new = self.row(row, here, (path, weight), expert)
                for (name, place), part in zip(
                    places, new.split([len(new) // len(places)] * len(places)), strict=True
                ):
                    whole = changed.get(name, self.model.get_parameter(name).detach()).clone()
                    if place is None:
                        whole = part
                    else:
                        whole[place] = part
                    changed[name] = whole
        return changed

    def row(self, row: Tensor, here: Sequence[DenseAdapter], key: WeightKey, expert: int) -> Tensor:
        """One expert's weight with the deltas of the adapters of its container."""
        total = row
        for adapter in here:
            if key not in adapter.tensors or expert not in adapter.experts[key[0]]:
                continue
            place = adapter.experts[key[0]].index(expert)
            if adapter.is_frozen:
                stored = adapter.tensors[key][0][place]
                if len(here) == 1 and adapter.scale == 1:
                    return stored.to(row.dtype)
                delta = adapter.scale * (stored.float() - row.float())
            else:
                delta = self.delta(adapter, key)[place]
            wide = torch.promote_types(total.dtype, delta.dtype)
            total = total.to(wide) + delta.to(wide)
        return total.to(row.dtype)

    def delta(self, adapter: DenseAdapter, key: WeightKey) -> Tensor:
        (first, *others) = adapter.tensors[key]
        scale = adapter.scaling * adapter.scale
        delta = others[0] @ first if others else first
        return delta if scale == 1 else scale * delta

    def freeze(self, name: str) -> None:
        """Puts an adapter's rows in the place of its deltas."""
        adapter = self.adapters[name]
        rows: dict[WeightKey, list[Tensor]] = {}
        dense = self.weights([name])
        for path, ids in adapter.experts.items():
            for weight in self.weights_of(path):
                own = []
                for expert in ids:
                    places = self.places(path, weight, expert)
                    whole = [dense.get(n, self.model.get_parameter(n).detach()) for n, _ in places]
                    own.append(torch.cat([w if p is None else w[p] for w, (_, p) in zip(whole, places, strict=True)]))
                rows[path, weight] = [torch.stack(own)]
        self.adapters[name] = DenseAdapter(adapter.experts, rows, is_frozen=True)

    def base_row(self, path: str, weight: str, expert: int) -> Tensor:
        """An expert's part of a weight, in fp32."""
        parameters = [(self.model.get_parameter(n), place) for n, place in self.places(path, weight, expert)]
        return torch.cat([p if place is None else p[place] for p, place in parameters]).float()

    def combine(self, names: Sequence[str], factors: Sequence[float]) -> DenseAdapter:
        """The weighted sum of the deltas of some adapters, over the union of their experts."""
        experts: dict[str, list[int]] = {}
        sums: dict[tuple[WeightKey, int], Tensor] = {}
        for name, factor in zip(names, factors, strict=True):
            adapter = self.adapters[name]
            for path, ids in adapter.experts.items():
                experts[path] = list(dict.fromkeys([*experts.get(path, []), *ids]))
            for (path, weight), tensors in adapter.tensors.items():
                for place, expert in enumerate(adapter.experts[path]):
                    if adapter.is_frozen:
                        delta = adapter.scale * (tensors[0][place].float() - self.base_row(path, weight, expert))
                    else:
                        delta = self.delta(adapter, (path, weight))[place].float()
                    old = sums.get(((path, weight), expert), torch.zeros_like(delta))
                    sums[(path, weight), expert] = old + factor * delta
        tensors = {}
        for path, ids in experts.items():
            for weight in self.weights_of(path):
                some = self.base_row(path, weight, ids[0])  # adapters of low rank leave biases as they are
                rows = [sums.get(((path, weight), expert), torch.zeros_like(some)) for expert in ids]
                tensors[path, weight] = [torch.stack(rows).detach()]
        return DenseAdapter(experts, tensors)

    def weights_of(self, path: str) -> list[str]:
        """Names of the weights of a container."""
        module = self.model.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            return [*LISTED_PARTS]
        return [name.removesuffix(".weight") for name, _ in module.named_parameters()]

    def places(self, path: str, weight: str, expert: int) -> list[tuple[str, int | None]]:
        """The parameters that hold an expert's weight, and its place in each if it is not the whole of it."""
        module = self.model.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            return [(f"{path}.{expert}.{part}.weight", None) for part in LISTED_PARTS[weight]]
        if weight in dict(module.named_parameters(recurse=False)):
            return [(f"{path}.{weight}", expert)]
        return [(f"{path}.{weight}.weight", None)]


def dense_copy(model: nn.Module) -> DenseModel:
    return DenseModel(copy.deepcopy(model).requires_grad_(False))
