"""Defines the layer for a list of expert modules, which gives out experts with the adapters' deltas."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...moe.weights import ListedWeight
from .effective_rows import effective_row
from .substituted import AdaptedPart, SubstitutedExperts, substitution_lock


class ListedExperts(SubstitutedExperts):
    """A `ModuleList` or `ModuleDict` of experts.

    One that has a forward of its own is called with the selected experts' weights substituted. One that has none is
    indexed by the module that holds it; what it gets then is an expert with the active adapters' deltas.
    """

    @property
    def _experts(self) -> Any:
        return self.base_layer

    def __getitem__(self, key: Any) -> Any:
        expert = self._experts[key]
        if isinstance(key, slice):
            return [self[place] for place in range(len(self))[key]]
        return self._adapted(expert) if self._changes_parts("experts one by one") else expert

    def __len__(self) -> int:
        return len(self._experts)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._experts, nn.ModuleDict):
            return iter(self._experts)
        return (self[place] for place in range(len(self)))

    def __contains__(self, key: object) -> bool:
        return key in self._experts

    def items(self) -> list[tuple[str, Any]]:
        """Names and experts of a `ModuleDict`."""
        return [(key, self[key]) for key in self._experts]

    def values(self) -> list[Any]:
        """The experts of a `ModuleDict`."""
        return [self[key] for key in self._experts]

    def _adapted(self, expert: nn.Module) -> AdaptedPart:
        """One of the experts, with the active adapters' deltas."""
        return AdaptedPart(expert, partial(self._effective_expert, expert), self._call_part)

    def _effective_expert(self, expert: nn.Module) -> dict[str, Tensor]:
        """The parameters of an expert that deltas change, by path below it; none if no active adapter trains it."""
        active = self.active()
        if active is None:
            return {}
        weights = [weight for weight in self.weights.values() if isinstance(weight, ListedWeight)]  # all of them
        modules = weights[0].expert_modules(self.base_layer)
        expert_id = next(number for number, module in enumerate(modules) if module is expert)
        if expert_id not in active.expert_ids:
            return {}
        place, held = active.expert_ids.index(expert_id), self.held_rows(active)
        substitutes: dict[str, Tensor] = {}
        with substitution_lock(), self.onloaded(active.names):
            for weight in weights:
                if held is not None:
                    row = held[weight.name][place]
                else:
                    row = effective_row(self, weight.name, active.names, expert_id)
                substitutes |= weight.substitutes_of_expert(self.base_layer, expert_id, row)
        return substitutes
