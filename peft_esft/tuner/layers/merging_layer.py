"""`MergingLayer`: effective rows written into the base, and the base's own put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from ...moe.containers import ExpertsContainer
from .adapter_weights import AdapterWeights
from .resident import Key, Resident, RowBank, planning


@dataclass(frozen=True, eq=False)
class MergeState:
    """What is merged into a layer.

    Attributes:
        adapters: their names.
        replaced_ids: the experts whose rows were replaced.
        replaced_rows: these rows, by weight name.
    """

    adapters: list[str]
    replaced_ids: list[int]
    replaced_rows: dict[str, Tensor]


class MergingLayer(AdapterWeights):
    """Adapter weights that can be merged. The base is written to here only."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, container: ExpertsContainer) -> None:
        super().__init__(base_layer, adapter_name, container)
        self.bank = RowBank()
        self.merged_adapters: list[str] = []
        # The rows that merging replaced: the expert ids, and each weight's rows before the first merge.
        self._replaced_ids: list[int] = []
        self._replaced_rows: dict[str, Tensor] = {}
        # The memory of the last merge, for the next one: writing to new memory takes longer than the copy itself.
        self._spare_rows: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Takes note of what a forward pass has to add; to be called whenever that changes."""
        raise NotImplementedError

    def resident(self, key: Key, *, in_training: bool = True) -> Resident | None:
        """The effective rows of adapters, computed once until a delta or the base changes."""
        raise NotImplementedError

    def base_rows(self, weight_name: str, expert_ids: Sequence[int]) -> Tensor:
        """A copy of the base's rows of some experts, `[n, ...]`, as they were before merging."""
        rows = super().base_rows(weight_name, expert_ids)
        for place, expert in enumerate(expert_ids):
            if expert in self._replaced_ids:
                rows[place] = self._replaced_rows[weight_name][self._replaced_ids.index(expert)]
        return rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergingLayer:
        super()._apply(fn, recurse)
        self._replaced_rows = {name: fn(rows) for name, rows in self._replaced_rows.items()}
        return self

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the effective rows of the adapters into the base, keeping the rows that they replace.

        Args:
            safe_merge: check first that all merged rows are finite.
            adapter_names: the adapters to merge; None means the active ones.

        Raises:
            ValueError: with `safe_merge`, if a merged row is not finite. The base is then unchanged.
        """
        new_names = list(dict.fromkeys(check_adapters_to_merge(self, adapter_names)))
        if not new_names:
            return
        if safe_merge:
            self.check_finite([*self.merged_adapters, *new_names])
        # Also those without experts here: a layer that they leave alone adds no other adapters either.
        merged_adapters = [*self.merged_adapters, *new_names]
        if not self.adapters_here(new_names):
            self.merged_adapters = merged_adapters
            self.prepare()
            return
        names = self.adapters_here(merged_adapters)
        ids = self.union_of_experts(names)
        new_ids = ids[len(self._replaced_ids) :]
        known = self.resident(tuple(names), in_training=False) if len(names) == 1 else None
        originals, merged = {}, {}
        for weight_name, weight in self.weights.items():
            rows = self._replaced_rows.get(weight_name)
            if new_ids or rows is None:  # the latter without new ones where other processes own the experts
                spare = self._spare_rows.get(weight_name)
                out = None
                if rows is None and spare is not None and len(spare) >= len(new_ids):
                    out = spare[: len(new_ids)]
                new_rows = weight.read(self.get_base_layer(), new_ids, out=out)
                rows = new_rows if rows is None else torch.cat([rows.to(new_rows), new_rows])
            originals[weight_name] = rows
            with_deltas = (
                self._with_deltas(rows, ids, weight_name, names) if known is None else known.rows[weight_name]
            )
            merged[weight_name] = with_deltas
        self._replaced_ids, self._replaced_rows, self._spare_rows = ids, originals, {}
        self.merged_adapters = merged_adapters
        self._write_rows(ids, merged)
        if known is not None and self.is_trained(names[0]):
            with planning:
                self.bank.remove(known.key)
        self.prepare()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the replaced rows back: the base is then bit for bit what it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._write_rows(self._replaced_ids, self._replaced_rows)
        self.merged_adapters = []
        self._replaced_ids, self._replaced_rows, self._spare_rows = [], {}, self._replaced_rows
        self.prepare()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with the adapters merged into it if asked for."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def merge_state(self) -> MergeState:
        """What `restore_merge` needs."""
        return MergeState(list(self.merged_adapters), self._replaced_ids, self._replaced_rows)

    @torch.no_grad()
    def restore_merge(self, state: MergeState) -> None:
        """Undoes merges and unmerges, also ones that came to an end in the middle."""
        if state.replaced_ids or self._replaced_rows is not state.replaced_rows:
            with onload_layer(self):
                self._write_rows(self._replaced_ids, self._replaced_rows)
                # Computed again, and not kept: that would make every unmerge twice as long.
                names, ids = self.adapters_here(state.adapters), state.replaced_ids
                merged = {name: self._with_deltas(r, ids, name, names) for name, r in state.replaced_rows.items()}
                self._write_rows(ids, merged)
        self.merged_adapters = list(state.adapters)
        self._replaced_ids, self._replaced_rows, self._spare_rows = state.replaced_ids, state.replaced_rows, {}
        self.prepare()

    def _write_rows(self, ids: list[int], rows: dict[str, Tensor]) -> None:
        if rows and self._base_parameter(self.weight_names[0]).device.type == "meta":
            raise RuntimeError(
                f"{self.path} is offloaded, and its weights are not loaded: call the model's merge_adapter or "
                "unmerge_adapter, which load them, and not the layer's"
            )
        for weight_name, values in rows.items():
            self.weights[weight_name].write(self.get_base_layer(), ids, values)
