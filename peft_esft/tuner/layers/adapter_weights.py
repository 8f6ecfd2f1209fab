"""`AdapterWeights`: what the tensors of adapters amount to, deltas and effective rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ...moe.weights import StackedWeight, expert_index, is_spread
from ...ops.deltas import add_deltas, rows_with_delta
from ...ops.encodings import decode
from ..combination import CombinationType, MajoritySignMethod, combine_deltas
from .adapter_tensors import PREFIX, AdapterTensors
from .offload import at_hand


class AdapterWeights(AdapterTensors):
    """Deltas and effective rows of a layer's adapters, alone and together.

    What a forward pass does with them is the business of `layer.ESFTLayer`.
    """

    def is_trained(self, adapter_name: str) -> bool:
        """True if a delta of the adapter requires a gradient."""
        return any(delta.requires_grad for delta in self._deltas_of([adapter_name]))

    def adapters_here(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the named adapters that have experts in this layer, each once."""
        return [name for name in dict.fromkeys(adapter_names) if name in self.expert_ids]

    def union_of_experts(self, adapter_names: Sequence[str]) -> list[int]:
        """The experts that at least one of the adapters trains, in the order in which they first occur."""
        return list(dict.fromkeys(expert for name in adapter_names for expert in self.expert_ids[name]))

    def get_delta_weight(self, adapter_name: str, weight_name: str) -> Tensor | None:
        """The change of a weight that an adapter makes, `[n, ...]`; None if it leaves that weight as it is."""
        if self.storage[adapter_name] != "delta":
            rows = self.base_rows(weight_name, self.expert_ids[adapter_name])
            return self._stored_delta(weight_name, adapter_name, rows)
        factors = self._delta_parameters(weight_name, adapter_name)
        if not factors:
            return None
        scale = self.scaling[adapter_name] * self.scale[adapter_name]
        delta = factors[0] if len(factors) == 1 else factors[1] @ factors[0]
        return delta if scale == 1 else scale * delta

    def base_rows(self, weight_name: str, expert_ids: Sequence[int]) -> Tensor:
        """A copy of the base's rows of some experts, `[n, ...]`."""
        return self.weights[weight_name].read(self.get_base_layer(), expert_ids)

    def at_hand(self, base_layer: nn.Module) -> AbstractContextManager[None]:
        """Has the weights of `base_layer`, this layer's or one tied to it, loaded if it is offloaded."""
        return at_hand(base_layer, self.weights[self.weight_names[0]].parameters(base_layer)[0])

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies an adapter's deltas by `scale` from now on; 1 is how it was trained."""
        self.scale[adapter_name] = scale
        self._forget_adapter(adapter_name)

    @torch.no_grad()
    def combine(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType,
        density: float | None,
        majority_sign_method: MajoritySignMethod,
    ) -> None:
        """Sets the deltas of an adapter of full rank to a combination of others, see `combination.combine_deltas`."""
        ids = self.expert_ids[adapter_name]
        for weight_name in self.weight_names:
            target = self._delta_parameters(weight_name, adapter_name)[0]
            deltas, factors = [], []
            for name, weight in zip(adapters, weights, strict=True):
                with self.at_hand(self.get_base_layer()):
                    delta = self.get_delta_weight(name, weight_name) if name in self.expert_ids else None
                if delta is not None:
                    places = expert_index([ids.index(expert) for expert in self.expert_ids[name]], delta.device)
                    deltas.append((places, delta.to(target.dtype)))
                    factors.append(weight)
            if deltas:
                combined = combine_deltas(deltas, factors, len(ids), combination_type, density, majority_sign_method)
                target.copy_(combined)
        self._forget_adapter(adapter_name)

    def effective_rows(
        self, weight_name: str, adapter_names: Sequence[str], expert_ids: Sequence[int] | None = None
    ) -> Tensor:
        """The rows `W + delta` of a weight, `[n, ...]` in the base's dtype.

        Args:
            weight_name: which weight.
            adapter_names: whose deltas are added.
            expert_ids: whose rows; None means the union of the adapters' experts.
        """
        ids = self.union_of_experts(adapter_names) if expert_ids is None else list(expert_ids)
        weight = self.weights[weight_name]
        is_simple = len(adapter_names) == 1 and ids == self.expert_ids[adapter_names[0]]
        if is_simple and self.storage[adapter_names[0]] == "delta" and isinstance(weight, StackedWeight):
            delta = self.get_delta_weight(adapter_names[0], weight_name)
            if delta is not None:
                base = weight.whole(self.get_base_layer())
                return rows_with_delta(base, expert_index(ids, base.device), delta)
        rows = weight.read(self.get_base_layer(), ids)
        return self._with_deltas(rows, ids, weight_name, adapter_names)

    @torch.no_grad()
    def untrained_experts(self, adapter_name: str) -> list[int]:
        """Experts whose deltas are all zero: no token reached them in training; all of them before training.

        No expert is named where a process sees parts of the deltas only.
        """
        ids = self.expert_ids.get(adapter_name, [])
        deltas = self._deltas_of([adapter_name])
        if self.storage.get(adapter_name, "delta") != "delta" or any(map(is_spread, deltas)):
            return []
        moved = torch.zeros(len(ids), dtype=torch.bool)
        for name in self.weight_names:
            factors = self._delta_parameters(name, adapter_name)
            if factors:
                moved |= (factors[-1] != 0).flatten(1).any(1).cpu()
        return [expert for expert, has_moved in zip(ids, moved.tolist(), strict=True) if not has_moved]

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Refuses adapters whose merged rows would not be finite, each by itself or all of them together.

        Raises:
            ValueError: naming the adapter, or all.
        """
        here = self.adapters_here(adapter_names)
        for names in [[name] for name in here] + ([here] if len(here) > 1 else []):
            for weight_name in self.weight_names:
                if not self._has_finite_rows(weight_name, names):
                    who = f"adapter {names[0]} seems" if len(names) == 1 else f"sum of the adapters {names} seems"
                    where = f"in {weight_name} of {self.path}"
                    raise ValueError(f"NaNs detected in the merged weights. The {who} to be broken ({where})")

    def _has_finite_rows(self, weight_name: str, adapter_names: list[str]) -> bool:
        ids = self.union_of_experts(adapter_names)
        with self.at_hand(self.get_base_layer()):
            rows = self._with_deltas(self.base_rows(weight_name, ids), ids, weight_name, adapter_names)
        return bool(torch.isfinite(rows).all())

    def _deltas_of(self, adapter_names: Sequence[str]) -> list[nn.Parameter]:
        """All deltas and factors of some adapters."""
        return [d for own in adapter_names for name in self.weight_names for d in self._delta_parameters(name, own)]

    def _with_deltas(self, rows: Tensor, ids: list[int], weight_name: str, adapter_names: Sequence[str]) -> Tensor:
        """Adds the adapters' deltas to `rows`, the base's rows of the experts `ids`."""
        if len(adapter_names) == 1 and self.storage[adapter_names[0]] == "rows" and self.scale[adapter_names[0]] == 1:
            # Nothing is added, so nothing is rounded.
            (name,) = adapter_names
            places = [self.expert_ids[name].index(expert) for expert in ids]
            stored: Tensor = getattr(self, f"{PREFIX}{weight_name}_rows")[name].to(rows.dtype)
            return stored if places == list(range(len(stored))) else stored[places]
        deltas: list[tuple[Tensor | None, Tensor]] = []
        for name in adapter_names:
            own = self.expert_ids[name]
            delta = self.get_delta_weight(name, weight_name)
            if delta is None:
                continue
            places = [place for place, expert in enumerate(own) if expert in ids]
            if len(places) < len(own):
                delta = delta.index_select(0, expert_index(places, delta.device))
            positions = tuple(ids.index(own[place]) for place in places)
            exact = positions == tuple(range(len(ids)))
            deltas.append((None if exact else expert_index(positions, rows.device), delta))
        return add_deltas(rows, deltas)

    def _stored_delta(self, weight_name: str, adapter_name: str, rows: Tensor) -> Tensor:
        """The delta `[n, ...]` of an adapter that is stored in another form; `rows` are the base's of its experts."""
        if self.storage[adapter_name] == "rows":
            wide = torch.promote_types(rows.dtype, torch.float32)
            delta = getattr(self, f"{PREFIX}{weight_name}_rows")[adapter_name].to(wide) - rows.to(wide)
        else:
            codes = getattr(self, f"{PREFIX}{weight_name}_codes")[adapter_name]
            scales = getattr(self, f"{PREFIX}{weight_name}_scales")[adapter_name]
            delta = decode(self.storage[adapter_name], codes, scales, rows.shape[-1])
        return self.scale[adapter_name] * delta

    def _adapter_tensors(self, weight_name: str, adapter_name: str) -> list[Tensor]:
        """All tensors that an adapter's change of a weight depends on."""
        if self.storage[adapter_name] == "delta":
            return list(self._delta_parameters(weight_name, adapter_name))
        stored = (self._tensors(name) for name in self._stored_names[weight_name])
        return [tensors[adapter_name] for tensors in stored if adapter_name in tensors]

    def _delta_parameters(self, weight_name: str, adapter_name: str) -> list[nn.Parameter]:
        """An adapter's delta of a weight, or its factors A and B; none if it leaves the weight as it is."""
        return [deltas[adapter_name] for deltas in self._parameter_dicts(weight_name) if adapter_name in deltas]
