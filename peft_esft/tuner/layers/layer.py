"""Defines `ESFTLayer`, which wraps an experts module and has the adapters on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...moe.containers import ExpertsContainer
from ...moe.weights import ExpertWeight, StackedWeight, expert_index
from ...ops.encodings import FROZEN_SUFFIXES, SUFFIXES, delta_from, stored_layout
from ...ops.split_forward import expert_slots
from ..config import ESFTConfig
from ..mixed_batch import AdapterBatch, current_batch
from .effective_rows import base_rows, effective_rows
from .held import RowBank, is_holding, join_stored_rows
from .merging import merge, moved_record, unmerge
from .modes import plain_modes
from .offload import compute_device, is_offloaded, load_offloaded
from .records import ActiveAdapters, ExpertIds, LayerAdapter, MergeRecord, Owner, StoredScales, StoredTensors


PREFIX = "esft_"


class ESFTLayer(nn.Module, BaseTunerLayer):
    """An experts module whose forward pass uses the effective rows `W + delta` of the active adapters' experts.

    For every weight `w [E, ...]` of the module there is a `ParameterDict` `esft_w`, which has a delta `[n, ...]` for
    each adapter, in the order of the adapter's expert ids. An adapter with a rank has two factors of it instead,
    `esft_w_B [n, out, rank]` and `esft_w_A [n, rank, in]`. One that is stored in another form (`ops/encodings.py`) has
    the tensors of that form as buffers.

    Effective rows are computed in the forward pass that uses them, unless they are held (`held.py`). The kinds of
    experts modules are subclasses: `_adapted_forward` and `_mixed_forward` say what a forward pass does with the rows.

    Attributes:
        adapters: what is known of each adapter beside its tensors.
        merge_record: what is merged; None if nothing is.
        bank: the rows of the adapters that are stored as rows, once a mixed batch has asked for them.
        owner: the same for all layers of a model.
        version: replaced whenever the adapters, or what is active, change.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, container: ExpertsContainer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = container.path
        self.kind = container.kind
        self.layout = container.layout
        self.num_experts = container.num_experts
        self.num_identity_experts = container.num_identity_experts
        self.in_features = self.out_features = container.hidden_size
        self.weights: dict[str, ExpertWeight] = {weight.name: weight for weight in container.weights}
        self.weight_names = tuple(self.weights)
        self._delta_names: dict[str, list[str]] = {}
        for name, shape in container.weight_shapes.items():
            suffixes = ("", "_A", "_B") if len(shape) == 2 else ("",)
            self._delta_names[name] = [f"{PREFIX}{name}{suffix}" for suffix in suffixes]
            self.adapter_layer_names += tuple(self._delta_names[name])
            self.other_param_names += tuple(f"{PREFIX}{name}{suffix}" for suffix in FROZEN_SUFFIXES)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            stored = StoredScales if name.endswith("_scales") else StoredTensors
            setattr(self, name, stored({}, persistent=True))
        # Tables that follow from the expert ids. They are not buffers: an EMA of the model, or its copy on another
        # process, need not have asked for the same ones.
        self._tables: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self.adapters: dict[str, LayerAdapter] = {}
        self.merge_record: MergeRecord | None = None
        self.bank: RowBank | None = None
        self.owner = Owner()
        self.version = object()
        self._active_adapter = adapter_name
        self._active: ActiveAdapters | None = None
        self.register_load_state_dict_post_hook(_refresh_active)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.refresh_active()  # a copy of a model is in no hold

    def __getattr__(self, name: str) -> Any:
        """Attributes of the experts module stay visible through the wrapper."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A module may have a `__deepcopy__` of its own, as parametrized ones do: it would copy that module alone.
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    @property
    def expert_ids(self) -> ExpertIds:
        """The experts that each adapter changes, in the order of its rows."""
        return ExpertIds(self.adapters)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapters that are merged, also those without experts in this layer."""
        return [] if self.merge_record is None else list(self.merge_record.names)

    @plain_modes()
    def update_layer(self, adapter_name: str, expert_ids: Sequence[int], config: ESFTConfig) -> None:
        """Adds an adapter, in place of one that has its name.

        Args:
            adapter_name: its name.
            expert_ids: the experts it changes, in the order of its rows.
            config: for `rank`, `init_weights`, `storage` and `inference_mode`.
        """
        self.discard_adapter(adapter_name)
        adapter = self.adapters[adapter_name] = self._new_record(expert_ids, config)
        for name, weight in self.weights.items():
            shape = (len(adapter.expert_ids), *weight.shape(self.get_base_layer()))
            if config.storage != "delta":
                self._add_stored(name, adapter_name, shape)
            elif config.rank is None:
                self._add_delta(name, "", adapter_name, shape, zero=config.init_weights)
            elif len(shape) == 3:
                # As LoRA does: A random, B zero.
                self._add_delta(name, "_A", adapter_name, (shape[0], config.rank, shape[2]), zero=False)
                self._add_delta(name, "_B", adapter_name, (*shape[:2], config.rank), zero=config.init_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_record(self, expert_ids: Sequence[int], config: ESFTConfig) -> LayerAdapter:
        return LayerAdapter(tuple(expert_ids), config.storage, config.scaling)

    def _add_delta(
        self, weight_name: str, suffix: str, adapter_name: str, shape: tuple[int, ...], *, zero: bool
    ) -> None:
        # At least fp32: transformers attaches and loads adapters without asking PEFT to widen them.
        dtype, device = self.delta_dtype(weight_name), self.compute_device
        deltas = self._tensors(f"{PREFIX}{weight_name}{suffix}")
        # One zero for all: what is registered under PEFT's low_cpu_mem_usage goes to the meta device at once.
        deltas[adapter_name] = nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape))
        if deltas[adapter_name].device != device:
            return
        delta = deltas[adapter_name].data = torch.zeros(shape, dtype=dtype, device=device)
        if not zero and suffix == "_A":
            nn.init.uniform_(delta, -1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1]))
        elif not zero:
            nn.init.normal_(delta, std=0.02)

    def _add_stored(self, weight_name: str, adapter_name: str, shape: tuple[int, ...]) -> None:
        """Makes room for the tensors of an adapter that is stored as rows or codes."""
        weight, base, adapter = self.weights[weight_name], self.get_base_layer(), self.adapters[adapter_name]
        layout = stored_layout(adapter.storage, shape, self.base_dtype(weight_name))
        for suffix, (dtype, size) in layout.items():
            tensor = torch.zeros(size, dtype=dtype, device=self.compute_device)
            if suffix == "_rows" and not weight.parameters(base)[0].is_meta:
                tensor.copy_(weight.read(base, adapter.expert_ids))
            self.stored(weight_name, suffix)[adapter_name] = tensor

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, see `peft.tuners.tuners_utils.BaseTunerLayer.set_adapter`."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.refresh_active()

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters on or off, see `peft.tuners.tuners_utils.BaseTunerLayer.enable_adapters`."""
        if not enabled and self.merged:
            # Now and not in the forward, as PEFT's layers do: an error there would leave half of the layers merged.
            with onload_layer(self):
                self.unmerge()
        super().enable_adapters(enabled)
        self.refresh_active()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter, see `peft.tuners.tuners_utils.BaseTunerLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self.discard_adapter(adapter_name)

    def discard_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and leaves the choice of the active ones as it is."""
        self._remove_tensors(adapter_name)
        self._set_record(adapter_name, None)
        if self.bank is not None and adapter_name in self.bank.views:
            join_stored_rows(self)

    def replace_adapter(self, adapter_name: str, incoming: str, is_trained: bool) -> None:
        """Gives an adapter the experts and weights of another one, which is removed. Either may have none here.

        Where shapes are equal the values are copied, so that an optimizer goes on with the same parameters.
        """
        self._end_offloading()
        record, new, old = self.adapters.get(incoming), self.tensors_of(incoming), self.tensors_of(adapter_name)
        self.discard_adapter(incoming)
        for name in old.keys() - new.keys():
            del self._tensors(name)[adapter_name]
        for name, incoming_tensor in new.items():
            tensor, known = incoming_tensor, old.get(name)
            if isinstance(tensor, nn.Parameter):
                if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
                    known.data.copy_(tensor.data)
                    tensor = known
                tensor.requires_grad_(is_trained)
            self._tensors(name)[adapter_name] = tensor
        self._set_record(adapter_name, record)

    def freeze_adapter(self, adapter_name: str) -> None:
        """Replaces an adapter's deltas by its effective rows: the form "rows" of `ops/encodings.py`."""
        rows = self.rows_of(adapter_name)
        self._remove_tensors(adapter_name)
        for name, own in rows.items():
            self.stored(name, "_rows")[adapter_name] = own
        self._set_record(adapter_name, LayerAdapter(self.adapters[adapter_name].expert_ids, "rows"))

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies an adapter's deltas by `scale` from now on; 1 is how it was trained."""
        self._set_record(adapter_name, replace(self.adapters[adapter_name], scale=scale))

    def convert(self, adapter_name: str, conversion: Callable[[str, Tensor], Tensor]) -> None:
        """Replaces each tensor of an adapter by what `conversion(name, tensor)` makes of it."""
        for name, tensor in self.tensors_of(adapter_name).items():
            new = conversion(name, tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            self._tensors(name)[adapter_name] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        self.refresh_active()

    def cast_adapter(self, adapter_name: str, *, to_base_dtype: bool) -> None:
        """Gives rows and scales, which are not trained, their dtypes back after PEFT widened them to fp32.

        Args:
            adapter_name: the adapter.
            to_base_dtype: give deltas the base's dtype too. Its rounding then swallows small updates.
        """
        wanted: dict[str, torch.dtype] = {}
        for name in self.weights:
            wanted |= {f"{PREFIX}{name}_rows": self.base_dtype(name), f"{PREFIX}{name}_scales": torch.bfloat16}
            if to_base_dtype:
                wanted |= dict.fromkeys(self._delta_names[name], self.base_dtype(name))
        self.convert(adapter_name, lambda name, tensor: tensor.to(wanted.get(name, tensor.dtype)))
        if adapter_name in self.adapters:
            self._set_record(adapter_name, replace(self.adapters[adapter_name], in_base_dtype=to_base_dtype))

    def delta_dtype(self, weight_name: str) -> torch.dtype:
        """The dtype that deltas of a weight are created in: that of the weight, but at least fp32."""
        return torch.promote_types(self.base_dtype(weight_name), torch.float32)

    @plain_modes()
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own looks for `base_layer.weight`, which experts need not have, and casts to its dtype: that would
        # round the fp32 deltas of a half-precision base whenever an adapter is loaded with low_cpu_mem_usage.
        target = self.compute_device if device is None else device
        self.convert(adapter_name, lambda _, tensor: tensor if tensor.is_meta else _plain(tensor.to(target)))

    @plain_modes()
    def _end_offloading(self) -> None:
        """Has the adapters' tensors stay loaded, if accelerate keeps them away between calls.

        For changes of them: its hooks load the tensors that they found when they were made, and no others.
        """
        for name in (*self.adapter_layer_names, *self.other_param_names):
            tensors = self._tensors(name)
            if is_offloaded(tensors):
                with align_module_device(tensors):
                    loaded = {key: _copy_of(tensor) for key, tensor in tensors.items()}
                is_stored = isinstance(tensors, StoredTensors)
                setattr(self, name, type(tensors)(loaded, persistent=True) if is_stored else nn.ParameterDict(loaded))

    def _remove_tensors(self, adapter_name: str) -> None:
        self._end_offloading()
        for name in self.tensors_of(adapter_name):
            del self._tensors(name)[adapter_name]

    def _set_record(self, adapter_name: str, adapter: LayerAdapter | None) -> None:
        known = self.adapters.pop(adapter_name, None)
        if adapter is not None:
            self.adapters[adapter_name] = adapter
        if known is None or adapter is None or known.expert_ids != adapter.expert_ids:
            for names in [names for names in self._tables if adapter_name in names]:
                del self._tables[names]
        self.refresh_active()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ESFTLayer:
        record = None if self.merge_record is None else moved_record(self, self.merge_record, fn)
        super()._apply(fn, recurse)
        self.merge_record = None if record is None else record()
        self.bank = None  # of the old device or dtype
        self._tables.clear()
        self.refresh_active()
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the effective rows of adapters into the base, keeping the rows that they replace.

        Args:
            safe_merge: check first that all merged rows are finite.
            adapter_names: the adapters to merge; None means the active ones.

        Raises:
            ValueError: with `safe_merge`, if a merged row is not finite.
            NotImplementedError: if the base's weights are computed from other tensors.
            RuntimeError: if they are offloaded, or an adapter has no data.
        """
        new_names = check_adapters_to_merge(self, adapter_names)
        if new_names:
            merge(self, new_names, safe_merge)

    def unmerge(self) -> None:
        """Puts the base's own rows back: it is then bit for bit what it was."""
        unmerge(self)

    def refresh_active(self) -> None:
        """Puts together what a forward pass adds, from the adapters of the layer and which of them are active."""
        self.version = object()
        is_off = self._disable_adapters or self.merge_record is not None
        names = () if is_off else tuple(self.adapters_here(self.active_adapters))
        if not names:
            self._active = None
            return
        ids, (index, slots) = tuple(self.union_of_experts(names)), self.tables(names)
        held = self.stored_rows_of(names[0]) if self.is_stored_as_rows(names) else None
        self._active = ActiveAdapters(names, ids, index, slots, self._plain_deltas(names), held)

    def hold(self) -> None:
        """Computes the effective rows of the active adapters, for calls within `held.holding`."""
        if self._active is not None and not self.is_stored_as_rows(self._active.names):
            with plain_modes(), self.onloaded(self._active.names):
                rows = {name: self.effective_rows(name, self._active.names) for name in self.weights}
            self._active = replace(self._active, held=rows)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_through(self.base_layer, *args, **kwargs)

    def forward_through(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of `base_layer`, this layer's or one tied to it, with the adapters that are asked for."""
        batch = self.batch()
        # The weights are read here and not by the module's own forward, around which accelerate loads them.
        if batch is not None and batch.rows.get(self) is not None:
            with self.onloaded((), base_layer):
                return self._mixed_forward(base_layer, batch, *args, **kwargs)
        active = self.active() if batch is None else None
        if active is not None:
            with self.onloaded(active.names, base_layer):
                return self._adapted_forward(base_layer, active, *args, **kwargs)
        return base_layer(*args, **kwargs)

    def batch(self) -> AdapterBatch | None:
        """The batch of the call that runs, if that has `adapter_names` and is one of this layer's model.

        A call of another model may run within it, a draft model's or a teacher's.
        """
        batch = None if self._disable_adapters else current_batch()
        return batch if batch is not None and batch.owner is self.owner else None

    def active(self) -> ActiveAdapters | None:
        """What a call has to add, if anything. If adapters are disabled, merged ones are unmerged first."""
        if self._disable_adapters and self.merge_record is not None:
            with onload_layer(self):
                self.unmerge()
        return self._active

    def _adapted_forward(self, base_layer: nn.Module, active: ActiveAdapters, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _mixed_forward(self, base_layer: nn.Module, batch: AdapterBatch, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def check_mixes(self, model: nn.Module, adapters: Sequence[str]) -> None:
        """Refuses `adapter_names` if the rows of a call do not show which sample they belong to.

        Args:
            model: the base model.
            adapters: the different adapters of the batch.

        Raises:
            ValueError: naming the module.
        """

    def selected_weights(self, active: ActiveAdapters) -> tuple[dict[str, Tensor], bool]:
        """The active adapters' experts' weights in this call, `[n, ...]` by weight name.

        Returns:
            Deltas and True, where the effective rows are the base's rows plus these; else effective rows and False.
        """
        held = self.held_rows(active)
        if held is not None:
            return held, False
        if torch.compiler.is_compiling():
            deltas = active.deltas if self._has_known_deltas() else None
        else:
            deltas = self._plain_deltas(active.names)
        if deltas is not None:
            return dict(deltas), True
        return {name: self.effective_rows(name, active.names) for name in self.weights}, False

    def held_rows(self, active: ActiveAdapters) -> dict[str, Tensor] | None:
        """The effective rows of the active adapters, where they are held and no gradient of them is asked for."""
        held = active.held
        if not torch.compiler.is_compiling():
            # A compiled graph can see neither the names nor which thread calls it.
            if self.is_stored_as_rows(active.names):
                return self.stored_rows_of(active.names[0])
            held = held if is_holding(self.owner) else None
        if held is None or not torch.is_grad_enabled():
            return held
        known = (active.deltas or {}).values() if torch.compiler.is_compiling() else ()
        parameters = list(known) or self._deltas_of(active.names)
        return None if any(parameter.requires_grad for parameter in parameters) else held

    def selected_rows(self, active: ActiveAdapters) -> dict[str, Tensor]:
        """The effective rows of the active adapters' experts in this call, `[n, ...]` by weight name."""
        weights, are_deltas = self.selected_weights(active)
        return {name: self.effective_rows(name, active.names) for name in weights} if are_deltas else weights

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _has_known_deltas(self) -> bool:
        """Whether the deltas that compiled graphs know are the layer's still, and whole.

        Sharding puts others in their place. Asked while a graph is made, and not in it, which would then depend on
        the adapters' names.
        """
        assert self._active is not None
        known, live = self._active.deltas or {}, self._plain_deltas(self._active.names) or {}
        return all(live.get(name) is delta and not isinstance(delta, DTensor) for name, delta in known.items())

    def onloaded(
        self, adapter_names: Sequence[str], base_layer: nn.Module | None = None
    ) -> AbstractContextManager[Any]:
        """Has the weights of the module and of adapters where they are computed with, if accelerate keeps them away.

        Args:
            adapter_names: whose tensors are used.
            base_layer: the layer's module, or one tied to it.

        Raises:
            RuntimeError: if an adapter has no data. Adding its rows would silently leave it out.
        """
        base_layer = self.get_base_layer() if base_layer is None else base_layer
        # A compiled graph is not to depend on names.
        names = () if torch.compiler.is_compiling() else adapter_names
        is_away = next(iter(self.weights.values())).parameters(base_layer)[0].is_meta
        if not is_away and not any(tensor.is_meta for name in names for tensor in self.tensors_of(name).values()):
            return nullcontext()
        return load_offloaded(self, base_layer, names)

    def get_delta_weight(self, adapter_name: str, weight_name: str) -> Tensor | None:
        """The change of a weight that an adapter makes, `[n, ...]`; None if it leaves that weight as it is."""
        adapter = self.adapters[adapter_name]
        if adapter.storage == "delta":
            factors = self.delta_parameters(weight_name, adapter_name)
            stored: dict[str, Tensor] = dict(zip(("_A", "_B") if len(factors) > 1 else ("",), factors, strict=False))
        else:
            stored = {suffix: self.stored(weight_name, suffix)[adapter_name] for suffix in SUFFIXES[adapter.storage]}
        if not stored:
            return None
        length = self.weights[weight_name].shape(self.get_base_layer())[-1]
        rows = base_rows(self, weight_name, [adapter_name]) if adapter.storage == "rows" else None
        return delta_from(adapter.storage, stored, adapter.factor, length, rows)

    def effective_rows(self, weight_name: str, adapter_names: Sequence[str]) -> Tensor:
        """The rows `W + delta` of a weight, `[n, ...]`, see `effective_rows.effective_rows`."""
        return effective_rows(self, weight_name, adapter_names)

    def rows_of(self, adapter_name: str) -> dict[str, Tensor]:
        """An adapter's effective rows by weight name, to be kept beyond a call."""
        with plain_modes(), self.onloaded([adapter_name]):
            return {name: self.effective_rows(name, [adapter_name]) for name in self.weights}

    def is_trained(self, adapter_name: str) -> bool:
        """True if a delta of the adapter requires a gradient."""
        return any(delta.requires_grad for delta in self._deltas_of([adapter_name]))

    def is_stored_as_rows(self, adapter_names: Sequence[str]) -> bool:
        """True for a single adapter whose effective rows are its own tensors."""
        adapter = self.adapters[adapter_names[0]]
        return len(adapter_names) == 1 and adapter.storage == "rows" and adapter.scale == 1

    def adapters_here(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the named adapters that have experts in this layer, each once."""
        return [name for name in dict.fromkeys(adapter_names) if name in self.adapters]

    def union_of_experts(self, adapter_names: Sequence[str]) -> list[int]:
        """The experts that at least one of the adapters changes, in the order in which they first occur."""
        return list(dict.fromkeys(expert for name in adapter_names for expert in self.adapters[name].expert_ids))

    def tables(self, adapter_names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`index` and `slots` of some adapters, see `records.ActiveAdapters`."""
        names = tuple(adapter_names)
        if names not in self._tables:
            ids, device = self.union_of_experts(names), self.compute_device
            device = torch.device("cpu") if device.type == "meta" else device
            with plain_modes():
                slots = expert_slots([(ids, 0)], self.num_experts, len(ids), self.num_identity_experts)
                self._tables[names] = (expert_index(ids, device), slots.to(device, non_blocking=True))
        return self._tables[names]

    def tensors_of(self, adapter_name: str) -> dict[str, Tensor]:
        """An adapter's tensors, by the names that they have in its file after the layer's path."""
        names = (*self.adapter_layer_names, *self.other_param_names)
        return {name: self._tensors(name)[adapter_name] for name in names if adapter_name in self._tensors(name)}

    def stored(self, weight_name: str, suffix: str) -> Any:
        """The buffers of a weight by adapter name: `_rows`, `_codes` or `_scales`."""
        return self._tensors(f"{PREFIX}{weight_name}{suffix}")

    def stored_rows_of(self, adapter_name: str) -> dict[str, Tensor]:
        """The rows of an adapter that is stored as rows, by weight name."""
        return {name: self.stored(name, "_rows")[adapter_name] for name in self.weights}

    def delta_parameters(self, weight_name: str, adapter_name: str) -> list[nn.Parameter]:
        """An adapter's delta of a weight, or its factors A and B; none if it leaves the weight as it is."""
        dicts = (self._tensors(name) for name in self._delta_names[weight_name])
        return [deltas[adapter_name] for deltas in dicts if adapter_name in deltas]

    def _deltas_of(self, adapter_names: Sequence[str]) -> list[nn.Parameter]:
        return [d for own in adapter_names for name in self.weights for d in self.delta_parameters(name, own)]

    def _plain_deltas(self, adapter_names: Sequence[str]) -> dict[str, nn.Parameter] | None:
        """The deltas of one adapter by weight name, if its effective rows are rows of stacked weights and these."""
        (name, *others) = adapter_names
        if others or self.adapters[name].storage != "delta" or self.adapters[name].factor != 1:
            return None
        deltas = {weight: self.delta_parameters(weight, name) for weight in self.weights}
        is_plain = all(len(own) == 1 for own in deltas.values()) and all(
            isinstance(weight, StackedWeight) for weight in self.weights.values()
        )
        return {weight: own[0] for weight, own in deltas.items()} if is_plain else None

    def _tensors(self, name: str) -> Any:
        """A dict of tensors by adapter name, without the detours of a module's attributes."""
        return self._modules[name]

    def base_dtype(self, weight_name: str) -> torch.dtype:
        """The dtype of a weight of the base."""
        return self.weights[weight_name].dtype(self.get_base_layer())

    @property
    def compute_device(self) -> torch.device:
        """Where the module's weights are computed with."""
        base = self.get_base_layer()
        return compute_device(base, next(iter(self.weights.values())).parameters(base)[0])

    def __repr__(self) -> str:
        # PEFT reads the layer's type from the part before the bracket.
        return "esft." + super().__repr__()


def _refresh_active(layer: ESFTLayer, incompatible_keys: Any) -> None:
    layer.refresh_active()


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode and could not take part in training."""
    return tensor.clone() if tensor.is_inference() else tensor


def _copy_of(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
