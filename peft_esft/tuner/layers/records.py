"""Defines the records that a layer keeps of its adapters: of each one, the active ones, and the merged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ...moe.weights import ExpertWeight


@dataclass(frozen=True)
class LayerAdapter:
    """What a layer knows of an adapter beside its tensors. It is replaced when it changes, and never written to.

    Attributes:
        expert_ids: the experts that the adapter changes, in the order of its rows.
        storage: how its weights are stored, see `ops/encodings.py`.
        scaling: what the product of low-rank factors is multiplied with, `alpha / rank`.
        scale: what `set_scale` asked for.
        global_ids: under expert parallelism, the experts of all processes, of which `expert_ids` are this one's.
        in_base_dtype: PEFT was asked not to widen the deltas to fp32 (`autocast_adapter_dtype=False`).
    """

    expert_ids: tuple[int, ...]
    storage: str = "delta"
    scaling: float = 1.0
    scale: float = 1.0
    global_ids: tuple[int, ...] = ()
    in_base_dtype: bool = False

    @property
    def factor(self) -> float:
        """What a stored delta is multiplied with."""
        return self.scaling * self.scale


class ExpertIds(Mapping[str, list[int]]):
    """The experts that each adapter of a layer changes, in the order of its rows: a view of the layer's records.

    A view and not a copy: PEFT expects of a layer's dicts that deleting an adapter removes it from them.
    """

    def __init__(self, adapters: Mapping[str, LayerAdapter]) -> None:
        self._adapters = adapters

    def __getitem__(self, adapter_name: str) -> list[int]:
        return list(self._adapters[adapter_name].expert_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


@dataclass(frozen=True, eq=False)
class ActiveAdapters:
    """The adapters that a forward pass adds, and what it needs of them.

    Compiled graphs read this and not the adapters' names, so that one graph serves all adapters of one size.

    Attributes:
        names: the adapters; those without experts in this layer are left out.
        expert_ids: the experts that at least one of them changes.
        index: the same, int64 `[n]`.
        slots: int64 `[1, E + identity experts]`, see `ops.split_forward.expert_slots`.
        deltas: the adapter's parameters by weight name, where the effective rows are the base's rows plus these. For
            compiled graphs; an eager call looks them up by name.
        held: the effective rows by weight name, where they are held (`held.py`).
    """

    names: tuple[str, ...]
    expert_ids: tuple[int, ...]
    index: Tensor
    slots: Tensor
    deltas: dict[str, nn.Parameter] | None = None
    held: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class MergeRecord:
    """The adapters that are merged into a layer, and the base's own rows, which unmerging puts back.

    Attributes:
        names: the adapters, also those without experts in this layer.
        expert_ids: the experts whose rows were replaced.
        rows: the base's own rows of these, `[n, ...]` by weight name.
    """

    names: tuple[str, ...]
    expert_ids: tuple[int, ...]
    rows: dict[str, Tensor]


class Owner:
    """Stands for the model that layers belong to: they do not know it, but what is under way may concern another one.

    A copy of a model has one of its own.

    Attributes:
        holds: how many holds of the model are under way, in all threads.
    """

    def __init__(self) -> None:
        self.holds = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return Owner()

    def __reduce__(self) -> tuple[type[Owner], tuple[()]]:
        return Owner, ()


class AdapterLayer(Protocol):
    """What the files below `layer.py` use of an `ESFTLayer`, where each member is documented."""

    path: str
    owner: Owner
    version: object
    weights: dict[str, ExpertWeight]
    num_experts: int
    num_identity_experts: int
    adapters: dict[str, LayerAdapter]
    merge_record: MergeRecord | None
    bank: Any

    @property
    def merged_adapters(self) -> list[str]: ...
    @property
    def compute_device(self) -> torch.device: ...
    def get_base_layer(self) -> nn.Module: ...
    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...
    def adapters_here(self, adapter_names: Sequence[str]) -> list[str]: ...
    def union_of_experts(self, adapter_names: Sequence[str]) -> list[int]: ...
    def tables(self, adapter_names: Sequence[str]) -> tuple[Tensor, Tensor]: ...
    def tensors_of(self, adapter_name: str) -> dict[str, Tensor]: ...
    def stored(self, weight_name: str, suffix: str) -> Any: ...
    def stored_rows_of(self, adapter_name: str) -> dict[str, Tensor]: ...
    def is_stored_as_rows(self, adapter_names: Sequence[str]) -> bool: ...
    def delta_parameters(self, weight_name: str, adapter_name: str) -> list[nn.Parameter]: ...
    def get_delta_weight(self, adapter_name: str, weight_name: str) -> Tensor | None: ...
    def rows_of(self, adapter_name: str) -> dict[str, Tensor]: ...
    def onloaded(self, adapter_names: Sequence[str]) -> AbstractContextManager[Any]: ...
    def refresh_active(self) -> None: ...


class StoredTensors(BufferDict):
    """The tensors of adapters that are stored as rows or codes. Loading replaces them: a call may still read them."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        own = {f"{prefix}{name}": buffer for name, buffer in self.items() if f"{prefix}{name}" in state_dict}
        moved = {key: state_dict[key].to(buffer.device, buffer.dtype, copy=True) for key, buffer in own.items()}
        assigning = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict({**state_dict, **moved}, prefix, assigning, *others)


class StoredScales(StoredTensors):
    """The scales of codes. Conversions of the model leave their dtype: fp16 would round those of small deltas to 0."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredScales:
        before = dict(self.items())
        super()._apply(fn, recurse)
        for name, scales in before.items():
            if self[name].dtype != scales.dtype:
                self[name] = scales.to(self[name].device)
        return self
