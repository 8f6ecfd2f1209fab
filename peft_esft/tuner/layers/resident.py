"""Effective rows of adapters that are not being trained: one adapter after another, in one tensor for each weight."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor


Key = tuple[str, ...]
"""Adapters that are active together."""

planning = RLock()
"""Held while a call finds out where its rows lie, and while adapters come or go in another thread."""


@dataclass(frozen=True, eq=False)
class Place:
    """A piece of a bank, which is taken for as long as somebody holds this object."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Resident:
    """The rows of one key.

    Attributes:
        key: whose rows they are.
        place: where they lie in the bank.
        expert_ids: the experts they belong to, in order.
        bank: the bank's tensors, by weight name.
        rows: by weight name, `[n, ...]`, views of the bank.
        state: what they were computed from; they hold as long as it is unchanged.
        sources: the tensors in `state`; holding them keeps their ids from being given to other tensors.
    """

    key: Key
    place: Place
    expert_ids: tuple[int, ...]
    bank: dict[str, Tensor]
    rows: dict[str, Tensor]
    state: Any
    sources: list[Tensor] = field(default_factory=list, repr=False)


class RowBank:
    """The resident rows of one layer.

    Nothing is padded: the bank is as long as the rows that it was last made for. Rows that go leave a gap, which is
    filled when nobody holds their `Resident` any more; where no gap is wide enough, a new bank is made without gaps.
    Tensors and residents are replaced and never changed, so that a call goes on with those that it began with.

    Attributes:
        tensors: by weight name, `[capacity, ...]`.
        residents: by key.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.residents: dict[Key, Resident] = {}
        self._leaving: list[weakref.ref[Place]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> RowBank:
        """A copied model has parameters of its own, whose rows it computes when it needs them."""
        return RowBank()

    def __reduce__(self) -> tuple[type[RowBank], tuple[()]]:
        return RowBank, ()

    @property
    def capacity(self) -> int:
        """How many rows there is room for."""
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, gaps included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def put(
        self, key: Key, expert_ids: tuple[int, ...], rows: dict[str, Tensor], state: Any, sources: list[Tensor]
    ) -> Resident:
        """Copies rows into the bank, in place of those that the key had. Rows that lie there already stay.

        Args:
            key: whose they are.
            expert_ids: their experts.
            rows: by weight name, `[n, ...]`.
            state: what they were computed from.
            sources: the tensors in `state`.
        """
        known = self.residents.get(key)
        if known is not None and known.expert_ids == expert_ids and _same_places(known.rows, rows):
            return self._add(replace(known, state=state, sources=sources))
        del known
        self.remove(key)
        if not self._fits(rows):
            self.clear()
        num_rows = len(expert_ids)
        if not self.tensors:
            # The first rows are the bank.
            self.tensors, own, place = rows, rows, Place(0, num_rows)
        else:
            gap = self._gap(num_rows)
            start = self._grow(num_rows) if gap is None else gap
            place = Place(start, start + num_rows)
            own = {name: tensor[start : place.stop] for name, tensor in self.tensors.items()}
            with torch.inference_mode(False), torch.no_grad():
                for name, target in own.items():
                    target.copy_(rows[name])
        return self._add(Resident(key, place, expert_ids, self.tensors, own, state, sources))

    def remove(self, key: Key) -> None:
        """Forgets rows. Their place is free when nobody holds it any more."""
        resident = self.residents.get(key)
        if resident is None:
            return
        self.residents = {other: value for other, value in self.residents.items() if other != key}
        self._leaving.append(weakref.ref(resident.place))
        if not self.residents:
            self.clear()

    def remove_adapter(self, adapter_name: str) -> None:
        """Forgets all rows in which an adapter has a part."""
        for key in [key for key in self.residents if adapter_name in key]:
            self.remove(key)

    def clear(self) -> None:
        """Forgets all rows."""
        self.tensors, self.residents, self._leaving = {}, {}, []

    @property
    def gap_nbytes(self) -> int:
        """Bytes of rows that are nobody's."""
        used = sum(len(resident.expert_ids) for resident in self.residents.values())
        return self.nbytes // self.capacity * (self.capacity - used) if self.capacity else 0

    def compact(self) -> None:
        """Closes the gaps."""
        if self.gap_nbytes:
            self._grow(0)

    def _add(self, resident: Resident) -> Resident:
        self.residents = {**self.residents, resident.key: resident}
        return resident

    def _fits(self, rows: dict[str, Tensor]) -> bool:
        """True if the rows are such as the bank has."""
        return all(
            (tensor.shape[1:], tensor.dtype, tensor.device)
            == (rows[name].shape[1:], rows[name].dtype, rows[name].device)
            for name, tensor in self.tensors.items()
        )

    def _gap(self, num_rows: int) -> int | None:
        """Where so many rows are free in one piece."""
        leaving = [place for place in (held() for held in self._leaving) if place is not None]
        self._leaving = [weakref.ref(place) for place in leaving]
        places = [*(resident.place for resident in self.residents.values()), *leaving]
        end = 0
        for start, stop in [*sorted((place.start, place.stop) for place in places), (self.capacity, self.capacity)]:
            if start - end >= num_rows:
                return end
            end = max(end, stop)
        return None

    def _grow(self, num_rows: int) -> int:
        """Makes a new bank of exactly the residents' rows and `num_rows` more, whose place is returned."""
        residents = sorted(self.residents.values(), key=lambda resident: resident.place.start)
        used = sum(len(resident.expert_ids) for resident in residents)
        grown = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, old in self.tensors.items():
                grown[name] = old.new_empty(used + num_rows, *old.shape[1:])
                if residents:
                    torch.cat([resident.rows[name] for resident in residents], out=grown[name][:used])
        moved, start = {}, 0
        for resident in residents:
            place = Place(start, start + len(resident.expert_ids))
            rows = {name: tensor[start : place.stop] for name, tensor in grown.items()}
            moved[resident.key] = replace(resident, place=place, bank=grown, rows=rows)
            start = place.stop
        self.tensors, self.residents, self._leaving = grown, moved, []
        return used


def _same_places(own: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(
        own[name].data_ptr() == rows.data_ptr() and own[name].shape == rows.shape for name, rows in other.items()
    )
