"""`ESFTLayer`: adapter state, active adapters, merge and unmerge; what all kinds of experts layers share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import ESFTConfig
from .containers import READABLE_DTYPES, ExpertsContainer
from .functional import add_deltas, expert_slots, rows_with_delta


PREFIX = "esft_"


class ESFTLayer(nn.Module, BaseTunerLayer):
    """An experts container with, for each adapter, trainable deltas on the weights of that adapter's experts.

    For every weight `w [E, ...]` of the container there is a `ParameterDict` `esft_w` that holds, by adapter name, a
    delta `[n, ...]` in the order of the adapter's expert ids. The base is only written to by `merge` and `unmerge`.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        container: ExpertsContainer,
        expert_ids: Sequence[int],
        config: ESFTConfig,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = container.path
        self.layout = container.layout
        self.num_experts = container.num_experts
        self.num_identity_experts = container.num_identity_experts
        self.weight_names = container.weight_names
        self.adapter_layer_names = tuple(PREFIX + name for name in self.weight_names)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.expert_ids: dict[str, list[int]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._slots: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self._ids: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self._trained_pairs: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[Any, list[Tensor], Tensor]] = {}
        # The rows that merging replaced: the expert ids, and each weight's rows before the first merge.
        self._replaced_ids: list[int] = []
        self._replaced_rows: dict[str, Tensor] = {}
        self.in_features = self.out_features = container.hidden_size
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, expert_ids, config)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the experts module stay visible through the wrapper."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, expert_ids: Sequence[int], config: ESFTConfig) -> None:
        """Adds an adapter.

        Args:
            adapter_name: its name.
            expert_ids: the experts it trains, in the order of its rows.
            config: for `init_weights` and `inference_mode`.
        """
        self.expert_ids[adapter_name] = list(expert_ids)
        self._forget(adapter_name)
        self._trained_pairs[adapter_name] = torch.zeros(len(expert_ids), dtype=torch.int64)
        for name in self.weight_names:
            weight = self._base_weight(name)
            shape = (len(expert_ids), *weight.shape[1:])
            # At least fp32: transformers attaches and loads adapters without asking PEFT to widen them.
            delta = torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
            if not config.init_weights:
                nn.init.normal_(delta, std=0.02)
            self._deltas(name)[adapter_name] = nn.Parameter(delta)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, see `peft.tuners.tuners_utils.BaseTunerLayer.set_adapter`."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if names := self.adapters_here(self.active_adapters):
            # Found in place, they are no reason for a compiled model to compile again.
            device = self._base_weight(self.weight_names[0]).device
            self.slots(names, device)
            self._id_tensor(names, device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.expert_ids.pop(adapter_name, None)
        self._forget(adapter_name)

    def adapters_here(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the named adapters that have experts in this layer, each once."""
        return [name for name in dict.fromkeys(adapter_names) if name in self.expert_ids]

    def union_of_experts(self, adapter_names: Sequence[str]) -> list[int]:
        """The experts that at least one of the adapters trains, in the order in which they first occur."""
        return list(dict.fromkeys(expert for name in adapter_names for expert in self.expert_ids[name]))

    def effective_rows(self, weight_name: str, adapter_names: Sequence[str]) -> Tensor:
        """The rows `W + delta` of a weight for the union of the adapters' experts, `[n, ...]` in the base's dtype."""
        base = self._base_weight(weight_name)
        ids = self._id_tensor(adapter_names, base.device)
        if len(adapter_names) == 1:
            return rows_with_delta(base, ids, self._deltas(weight_name)[adapter_names[0]])
        rows = base.index_select(0, ids)
        return self._with_deltas(rows, self.union_of_experts(adapter_names), weight_name, adapter_names)

    def rows_for_forward(self, weight_name: str, adapter_names: Sequence[str]) -> Tensor:
        """`effective_rows`, computed once for adapters that are not trained, until a delta or the base changes."""
        deltas = [self._deltas(weight_name)[name] for name in adapter_names]
        sources = [self._base_weight(weight_name), *deltas]
        # A compiled graph cannot look at addresses, and tensors made in inference mode have no version.
        is_opaque = torch.compiler.is_compiling() or any(source.is_inference() for source in sources)
        if is_opaque or any(delta.requires_grad for delta in deltas):
            return self.effective_rows(weight_name, adapter_names)
        # Every in-place change raises a tensor's version, every replacement its address (or the parameter's identity).
        state = (tuple(adapter_names), [(id(s), s._version, s.data_ptr(), s.dtype, s.device) for s in sources])
        known = self._rows.get(weight_name)
        if known is None or known[0] != state:
            # A tensor made in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                rows = self.effective_rows(weight_name, adapter_names)
            # Holding the sources keeps their ids from being given to other tensors.
            known = (state, sources, rows)
            self._rows[weight_name] = known
        return known[2]

    def slots(self, adapter_names: Sequence[str], device: torch.device) -> Tensor:
        """The sorting keys of the experts, see `functional.expert_slots`; kept until an adapter changes."""
        key = (tuple(adapter_names), device)
        if key not in self._slots:
            ids = self.union_of_experts(adapter_names)
            self._slots[key] = expert_slots(ids, self.num_experts, device, self.num_identity_experts)
        return self._slots[key]

    def _id_tensor(self, adapter_names: Sequence[str], device: torch.device) -> Tensor:
        """`union_of_experts` as int64 `[n]`; kept, since making it would wait for an accelerator in every forward."""
        key = (tuple(adapter_names), device)
        if key not in self._ids:
            self._ids[key] = torch.tensor(self.union_of_experts(adapter_names), device=device)
        return self._ids[key]

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Stores an adapter's deltas in the base's dtype, at the price of updates that its rounding swallows."""
        for name in self.weight_names if adapter_name in self.expert_ids else ():
            deltas = self._deltas(name)
            deltas[adapter_name] = deltas[adapter_name].to(self._base_weight(name).dtype)

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Refuses adapters whose merged rows would not be finite.

        Raises:
            ValueError: naming the adapter.
        """
        for adapter_name in self.adapters_here(adapter_names):
            for weight_name in self.weight_names:
                if not bool(torch.isfinite(self.effective_rows(weight_name, [adapter_name])).all()):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken "
                        f"(in {weight_name} of {self.path})"
                    )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the effective rows of the adapters into the base, keeping the rows that they replace.

        Args:
            safe_merge: check first that all merged rows are finite.
            adapter_names: the adapters to merge; None means the active ones.

        Raises:
            ValueError: with `safe_merge`, if a merged row is not finite. The base is then unchanged.
        """
        names = self.adapters_here(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if safe_merge:
            self.check_finite(names)
        all_names = [*self.merged_adapters, *names]
        if len(all_names) == 1:
            self._merge_first(names[0])
            return
        ids = self.union_of_experts(all_names)
        new_ids = ids[len(self._replaced_ids) :]
        originals, merged = {}, {}
        for weight_name in self.weight_names:
            base = self._base_weight(weight_name)
            rows = base.index_select(0, torch.tensor(new_ids, dtype=torch.int64, device=base.device))
            if self._replaced_ids:
                rows = torch.cat([self._replaced_rows[weight_name].to(rows), rows])
            originals[weight_name] = rows
            merged[weight_name] = self._with_deltas(rows, ids, weight_name, all_names)
        self._replaced_ids, self._replaced_rows = ids, originals
        self.merged_adapters = all_names
        self._write_rows(ids, merged)

    def _merge_first(self, adapter_name: str) -> None:
        """Merges an adapter into an unmerged base in place: nothing is copied but the rows to keep."""
        ids = self.expert_ids[adapter_name]
        weights = {name: self._base_weight(name).data for name in self.weight_names}
        self._replaced_rows = {
            name: weight.index_select(0, self._id_tensor([adapter_name], weight.device))
            for name, weight in weights.items()
        }
        self._replaced_ids, self.merged_adapters = list(ids), [adapter_name]
        for name, weight in weights.items():
            # Expert by expert: the sum is taken in the wider dtype and rounded once, as in `functional.add_deltas`.
            for expert, change in zip(ids, self._deltas(name)[adapter_name], strict=True):
                weight[expert].add_(change)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the replaced rows back: the base is then bit for bit what it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._write_rows(self._replaced_ids, self._replaced_rows)
        self.merged_adapters = []
        self._replaced_ids, self._replaced_rows = [], {}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with the adapters merged into it if asked for."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def experts_without_tokens(self, adapter_name: str) -> list[int]:
        """Experts of an adapter that no token reached in any training step; empty before training."""
        experts = self.expert_ids.get(adapter_name, [])
        pairs = self._trained_pairs[adapter_name].tolist() if experts else []
        return [expert for expert, count in zip(experts, pairs, strict=True) if not count] if any(pairs) else []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        names = self.adapters_here(self.active_adapters)
        if self.merged or not names:
            return self.base_layer(*args, **kwargs)
        return self._adapted_forward(names, *args, **kwargs)

    def _adapted_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def _count_pairs(self, adapter_names: Sequence[str], pairs: Tensor) -> None:
        """Notes how many pairs each expert of the adapters under training got; `pairs` is int64 `[n]` of the union."""
        if not torch.is_grad_enabled():
            return
        ids = self.union_of_experts(adapter_names)
        for name in adapter_names:
            if not self._deltas(self.weight_names[0])[name].requires_grad:
                continue
            own = pairs if len(adapter_names) == 1 else pairs[[ids.index(expert) for expert in self.expert_ids[name]]]
            self._trained_pairs[name] = self._trained_pairs[name].to(own.device) + own

    def _with_deltas(self, rows: Tensor, ids: list[int], weight_name: str, adapter_names: Sequence[str]) -> Tensor:
        """Adds the adapters' deltas to `rows`, the base's rows of the experts `ids`."""
        deltas: list[tuple[Tensor | None, Tensor]] = []
        for name in adapter_names:
            own = self.expert_ids[name]
            positions = None if own == ids else torch.tensor([ids.index(expert) for expert in own], device=rows.device)
            deltas.append((positions, self._deltas(weight_name)[name]))
        return add_deltas(rows, deltas)

    def _write_rows(self, ids: list[int], rows: dict[str, Tensor]) -> None:
        for weight_name, values in rows.items():
            weight = self._base_weight(weight_name)
            weight.data.index_copy_(0, torch.tensor(ids, device=weight.device), values.to(weight))

    def _deltas(self, weight_name: str) -> nn.ParameterDict:
        return getattr(self, PREFIX + weight_name)

    def _base_weight(self, weight_name: str) -> Tensor:
        return getattr(self.get_base_layer(), weight_name)

    def _forget(self, adapter_name: str) -> None:
        """Drops what was derived from an adapter that changes."""
        self._slots = {key: slots for key, slots in self._slots.items() if adapter_name not in key[0]}
        self._ids = {key: ids for key, ids in self._ids.items() if adapter_name not in key[0]}
        self._trained_pairs.pop(adapter_name, None)
        self._rows = {}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own looks for `base_layer.weight`, which fused experts do not have, and casts to its dtype: that would
        # round the fp32 deltas of a half-precision base whenever an adapter is loaded with low_cpu_mem_usage.
        target = self._base_weight(self.weight_names[0]).device if device is None else device
        for weight_name in self.weight_names:
            deltas = self._deltas(weight_name)
            if adapter_name in deltas and deltas[adapter_name].device != torch.device("meta"):
                deltas[adapter_name] = deltas[adapter_name].to(target)

    def __repr__(self) -> str:
        # PEFT reads the layer's type from the part before the bracket.
        return "esft." + super().__repr__()


def check_base_weights(container: ExpertsContainer) -> None:
    """Refuses containers whose weights cannot be read as plain rows.

    Raises:
        NotImplementedError: for quantised or distributed weights, and under expert parallelism.
    """
    for name in container.weight_names:
        weight = getattr(container.module, name)
        if isinstance(weight, DTensor):
            raise NotImplementedError(
                f"{container.path}.{name} is a distributed tensor. Attach the adapter before the model is sharded; "
                "tensor and expert parallelism are not supported yet."
            )
        if weight.dtype not in READABLE_DTYPES:
            raise NotImplementedError(
                f"{container.path}.{name} has dtype {weight.dtype}, a quantised form that cannot be read. Load "
                f"the model in one of {[str(dtype) for dtype in READABLE_DTYPES]} (dtype=...; or dequantize=True in "
                "its quantization config)."
            )
    if getattr(container.module, "_is_expert_parallel", False):
        raise NotImplementedError(f"{container.path} is under expert parallelism, which is not supported yet")


def check_not_shared(container: ExpertsContainer, containers: dict[str, ExpertsContainer]) -> None:
    """Refuses a container whose weights are also those of another: one delta would have to serve both.

    Raises:
        NotImplementedError: naming both containers.
    """
    own = {id(getattr(container.module, name)) for name in container.weight_names}
    for other in containers.values():
        shared = [name for name in other.weight_names if id(getattr(other.module, name)) in own]
        if other.path != container.path and shared:
            raise NotImplementedError(
                f"{container.path} and {other.path} are tied: they share {shared}. Tied experts are not supported yet."
            )
