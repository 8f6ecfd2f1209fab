"""`ESFTLayer`: adapter state, active adapters, merge and unmerge; what all kinds of experts layers share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .architectures import READABLE_DTYPES
from .combination import CombinationType, MajoritySignMethod, combine_deltas
from .config import ESFTConfig
from .containers import ExpertsContainer
from .functional import add_deltas, rows_with_delta
from .mixed_batch import AdapterBatch, current_batch
from .offload import at_hand, compute_device, is_offloaded
from .resident import Key, Resident, RowBank, planning
from .storage import FROZEN_SUFFIXES, decode, stored_layout
from .weights import ExpertWeight, StackedWeight, expert_index, is_spread


PREFIX = "esft_"


@dataclass(eq=False)
class AdapterCall:
    """What a forward pass needs to know of the active adapters.

    A compiled graph reads this and not their names, so that it serves all adapters of equal size.

    Attributes:
        key: their names.
        expert_ids: the experts that at least one of them trains.
        index: the same as int64 `[n]`.
        slots: the layer's `functional.expert_slots` of them, if it needs any.
        deltas: by weight name, if the effective rows are the base's and these; for compiled graphs, since whatever
            moves or shards parameters replaces them.
        rows: the effective rows by weight name, if they are known to hold.
    """

    key: Key
    expert_ids: tuple[int, ...]
    index: Tensor
    slots: Tensor | None
    deltas: dict[str, Tensor] | None
    rows: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class MixedPlan:
    """Where the rows of the adapters of a batch lie; holding it keeps them there.

    Attributes:
        adapters: their names.
        residents: the rows of each; None for one that leaves this layer as it is.
        bank: by weight name, all rows `[n, ...]`.
        slots: int64 `[adapters, E + identity experts]`, the layer's `functional.expert_slots`, if it needs any.
    """

    adapters: list[str]
    residents: list[Resident | None]
    bank: dict[str, Tensor]
    slots: Tensor | None


@dataclass(frozen=True, eq=False)
class MergeState:
    """What is merged into a layer.

    Attributes:
        adapters: their names.
        replaced_ids: the experts whose rows were replaced.
        replaced_rows: these rows, by weight name.
        merged_rows: what was put in their place, by weight name.
    """

    adapters: list[str]
    replaced_ids: list[int]
    replaced_rows: dict[str, Tensor]
    merged_rows: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class AdapterState:
    """All that a layer has of an adapter.

    Attributes:
        tensors: one for each dict of tensors, None where it has none, and whether it is trained.
        values: copies of them, if asked for.
        settings: one for each dict of settings; empty if it has none.
    """

    tensors: list[tuple[Tensor, bool] | None]
    values: list[Tensor | None]
    settings: list[Any]


class ESFTLayer(nn.Module, BaseTunerLayer):
    """An experts container with, for each adapter, trainable deltas on the weights of that adapter's experts.

    For every weight `w [E, ...]` of the container there is a `ParameterDict` `esft_w` that holds, by adapter name, a
    delta `[n, ...]` in the order of the adapter's expert ids. An adapter with a rank holds two factors of it instead,
    `esft_w_B [n, out, rank]` and `esft_w_A [n, rank, in]`. One whose file is stored in another form (`storage.py`)
    holds the file's tensors as buffers. The base is only written to by `merge` and `unmerge`.
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
        self.kind = container.kind
        self.layout = container.layout
        self.num_experts = container.num_experts
        self.num_identity_experts = container.num_identity_experts
        self.weights: dict[str, ExpertWeight] = {weight.name: weight for weight in container.weights}
        self.weight_names = container.weight_names
        self._delta_names: dict[str, tuple[str, ...]] = {}
        self._stored_names: dict[str, tuple[str, ...]] = {}
        for name, shape in container.weight_shapes.items():
            suffixes = ("", "_A", "_B") if len(shape) == 2 else ("",)
            self._delta_names[name] = tuple(f"{PREFIX}{name}{suffix}" for suffix in suffixes)
            self._stored_names[name] = tuple(f"{PREFIX}{name}{suffix}" for suffix in FROZEN_SUFFIXES)
            self.adapter_layer_names += self._delta_names[name]
            self.other_param_names += self._stored_names[name]
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            setattr(self, name, BufferDict({}, persistent=True))
        self.storage: dict[str, str] = {}
        self.expert_ids: dict[str, list[int]] = {}
        # What deltas are multiplied with: of low-rank factors by the config, and what `set_scale` asks for.
        self.scaling: dict[str, float] = {}
        self.scale: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.bank = RowBank()
        self._call: AdapterCall | None = None
        self._calls: dict[Key, AdapterCall] = {}
        self._plan: MixedPlan | None = None
        # The rows that merging replaced: the expert ids, and each weight's rows before the first merge.
        self._replaced_ids: list[int] = []
        self._replaced_rows: dict[str, Tensor] = {}
        # The memory of the last merge, for the next one: writing to new memory takes longer than the copy itself.
        self._spare_rows: dict[str, Tensor] = {}
        self.in_features = self.out_features = container.hidden_size
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_forget_calls)
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
            config: for `rank`, `init_weights`, `storage` and `inference_mode`.
        """
        self.storage[adapter_name] = config.storage
        self.expert_ids[adapter_name] = list(expert_ids)
        self.scaling[adapter_name] = config.scaling
        self.scale[adapter_name] = 1.0
        self._forget_adapter(adapter_name)
        for name, weight in self.weights.items():
            shape = (len(expert_ids), *weight.shape(self.get_base_layer()))
            if config.storage != "delta":
                self._add_stored(name, adapter_name, shape)
            elif config.rank is None:
                self._add_delta(name, "", adapter_name, shape, zero=config.init_weights)
            elif len(shape) == 3:
                # As LoRA does: A random, B zero.
                self._add_delta(name, "_A", adapter_name, (shape[0], config.rank, shape[2]), zero=False)
                self._add_delta(name, "_B", adapter_name, (*shape[:2], config.rank), zero=config.init_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, see `peft.tuners.tuners_utils.BaseTunerLayer.set_adapter`."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.prepare()

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters on or off, see `peft.tuners.tuners_utils.BaseTunerLayer.enable_adapters`."""
        if not enabled and self.merged:
            # Now and not in the forward, as PEFT's layers do: an error there would leave half of the layers merged.
            with onload_layer(self):
                self.unmerge()
        super().enable_adapters(enabled)
        self.prepare()

    def prepare(self) -> None:
        """Takes note of what a forward pass has to add; to be called whenever that changes."""
        is_off = self._disable_adapters or bool(self.merged_adapters)
        names = [] if is_off else self.adapters_here(self.active_adapters)
        self._call = self.call_of(tuple(names)) if names else None
        if self._call is not None and self._call.rows is not None and any(self.is_trained(name) for name in names):
            self._call.rows = None

    def call_of(self, key: Key) -> AdapterCall:
        """What a forward pass with some adapters has to know, of which each has experts in this layer."""
        if key not in self._calls:
            ids = self.union_of_experts(key)
            index = expert_index(ids, self._table_device())
            slots = self._slots([(ids, 0)], len(ids))
            self._calls[key] = AdapterCall(key, tuple(ids), index, slots, self._plain_deltas(key))
        return self._calls[key]

    def forget_calls(self) -> None:
        """To be called whenever the tensors of an adapter were replaced, or their device changed."""
        self._calls, self._plan, self._spare_rows = {}, None, {}
        self.prepare()

    def _slots(self, selections: Sequence[tuple[Sequence[int], int]], num_rows: int) -> Tensor | None:
        """`functional.expert_slots` of this layer, if its forward needs any."""
        return None

    def _table_device(self) -> torch.device:
        device = compute_device(self.get_base_layer(), self._base_parameter(self.weight_names[0]))
        return torch.device("cpu") if device.type == "meta" else device

    def _apply(self, *args: Any, **kwargs: Any) -> ESFTLayer:
        super()._apply(*args, **kwargs)
        self.forget_calls()
        return self

    def _forget_adapter(self, *adapter_names: str) -> None:
        """To be called whenever the rows of an adapter change."""
        for name in adapter_names:
            self._take_stored_rows_out(name)
            self.bank.remove_adapter(name)
        self.forget_calls()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter from this layer."""
        super().delete_adapter(adapter_name)
        for settings in self._settings():
            settings.pop(adapter_name, None)
        self._forget_adapter(adapter_name)

    def replace_adapter(self, adapter_name: str, incoming: str, is_trained: bool) -> None:
        """Gives an adapter the experts and weights of another one, which ends; either may have none in this layer."""
        for tensors in self._all_tensors():
            old = tensors.pop(adapter_name) if adapter_name in tensors else None
            new = tensors.pop(incoming) if incoming in tensors else None
            if new is None:
                continue
            if isinstance(new, nn.Parameter):
                if old is not None and old.shape == new.shape and old.dtype == new.dtype:
                    old.data.copy_(new.data)
                    new = old
                new.requires_grad_(is_trained)
            tensors[adapter_name] = new
        for settings in self._settings():
            settings.pop(adapter_name, None)
            if incoming in settings:
                settings[adapter_name] = settings.pop(incoming)
        self._forget_adapter(adapter_name, incoming)

    def discard_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and leaves the choice of the active ones as it is."""
        for tensors in self._all_tensors():
            if adapter_name in tensors:
                del tensors[adapter_name]
        for settings in self._settings():
            settings.pop(adapter_name, None)
        self._forget_adapter(adapter_name)

    def adapter_state(self, adapter_name: str, *, copy: bool) -> AdapterState:
        """What `restore_adapter` needs; with `copy` also the values of the tensors."""
        # PEFT's dict of buffers has no `get`.
        own = [
            tensors[adapter_name] if adapter_name in tensors else None  # noqa: SIM401
            for tensors in self._all_tensors()
        ]
        return AdapterState(
            [None if tensor is None else (tensor, tensor.requires_grad) for tensor in own],
            [tensor.detach().clone() if copy and tensor is not None else None for tensor in own],
            [settings[adapter_name] for settings in self._settings() if adapter_name in settings],
        )

    @torch.no_grad()
    def restore_adapter(self, adapter_name: str, state: AdapterState) -> None:
        """Gives an adapter back what it had."""
        self.discard_adapter(adapter_name)
        for tensors, own, value in zip(self._all_tensors(), state.tensors, state.values, strict=True):
            if own is not None:
                tensor, is_trained = own
                tensors[adapter_name] = tensor.requires_grad_(is_trained)
                if value is not None:
                    tensor.data.copy_(value)
        for settings, setting in zip(self._settings(), state.settings, strict=False):
            settings[adapter_name] = setting
        self._forget_adapter(adapter_name)

    def _settings(self) -> list[dict[str, Any]]:
        """What is kept of each adapter beside its tensors."""
        return [self.expert_ids, self.scaling, self.scale, self.storage]

    def freeze_adapter(self, adapter_name: str) -> None:
        """Holds an adapter's effective rows in place of its deltas, which end: the form "rows" of `storage.py`."""
        resident = self.resident((adapter_name,), in_training=False)
        assert resident is not None  # since not in training
        for tensors in self._all_tensors():
            if adapter_name in tensors:
                del tensors[adapter_name]
        for name, rows in resident.rows.items():
            getattr(self, f"{PREFIX}{name}_rows")[adapter_name] = rows
        self.storage[adapter_name] = "rows"
        self.scaling[adapter_name] = self.scale[adapter_name] = 1.0
        sources = self._sources(resident.key)
        self.bank.put(resident.key, resident.expert_ids, resident.rows, self._state(sources), sources)
        self.forget_calls()

    def is_trained(self, adapter_name: str) -> bool:
        """True if a delta of the adapter requires a gradient."""
        return any(d.requires_grad for name in self.weight_names for d in self._delta_parameters(name, adapter_name))

    def adapters_here(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the named adapters that have experts in this layer, each once."""
        return [name for name in dict.fromkeys(adapter_names) if name in self.expert_ids]

    def union_of_experts(self, adapter_names: Sequence[str]) -> list[int]:
        """The experts that at least one of the adapters trains, in the order in which they first occur."""
        return list(dict.fromkeys(expert for name in adapter_names for expert in self.expert_ids[name]))

    def get_delta_weight(self, adapter_name: str, weight_name: str) -> Tensor | None:
        """The change of a weight that an adapter makes, `[n, ...]`; None if it leaves that weight as it is."""
        if self.storage[adapter_name] != "delta":
            own = self.expert_ids[adapter_name]
            rows = self._base_rows_of(self._replaced_rows.get(weight_name), self._replaced_ids, weight_name, own)
            return self._stored_delta(weight_name, adapter_name, rows)
        factors = self._delta_parameters(weight_name, adapter_name)
        if not factors:
            return None
        scale = self.scaling[adapter_name] * self.scale[adapter_name]
        delta = factors[0] if len(factors) == 1 else factors[1] @ factors[0]
        return delta if scale == 1 else scale * delta

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

    def weights_for(self, call: AdapterCall) -> tuple[dict[str, Tensor], bool]:
        """What the selected experts' weights are in a forward pass, `[n, ...]` by weight name.

        Returns:
            Effective rows and False; or, of adapters in training, their deltas and True.
        """
        if torch.compiler.is_compiling():
            if call.rows is not None:
                return call.rows, False
            if call.deltas is not None and not any(isinstance(delta, DTensor) for delta in call.deltas.values()):
                return call.deltas, True
        elif (resident := self.resident(call.key)) is not None:
            return resident.rows, False
        deltas = self._plain_deltas(call.key)
        if deltas is not None:
            return deltas, True
        return {name: self.effective_rows(name, call.key) for name in self.weight_names}, False

    def rows_for(self, call: AdapterCall) -> dict[str, Tensor]:
        """The selected experts' effective rows in a forward pass, `[n, ...]` by weight name."""
        weights, are_deltas = self.weights_for(call)
        return {name: self.effective_rows(name, call.key) for name in weights} if are_deltas else weights

    def resident(self, key: Key, *, in_training: bool = True) -> Resident | None:
        """The effective rows of adapters, computed once until a delta or the base changes.

        Args:
            key: the adapters.
            in_training: return None if the adapters are being trained.
        """
        is_trained = any(self.is_trained(name) for name in key)
        # Not even without gradients, as in an evaluation between steps: fused optimizers, FSDP and ZeRO write into
        # deltas without raising their version.
        if in_training and is_trained:
            self.bank.remove(key)
            return None
        sources = self._sources(key)
        state = None if is_trained else self._state(sources)
        known = self.bank.residents.get(key)
        if known is None or known.state != state or state is None:
            known = self._make_resident(key, state, sources)
        if not is_trained:
            self.call_of(key).rows = known.rows
        return known

    def _make_resident(self, key: Key, state: Any, sources: list[Tensor]) -> Resident:
        with planning:
            if len(key) > 1:
                for other in [other for other in self.bank.residents if len(other) > 1]:
                    self.bank.remove(other)
            # A tensor made in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad(), self._at_hand(self.get_base_layer()):
                rows = {name: self.effective_rows(name, key) for name in self.weight_names}
            self.bank.put(key, tuple(self.union_of_experts(key)), rows, state, sources)
            self._share_stored_rows()
        return self.bank.residents[key]

    def _at_hand(self, base_layer: nn.Module) -> AbstractContextManager[None]:
        """Has the weights of `base_layer`, this layer's or one tied to it, loaded if it is offloaded."""
        return at_hand(base_layer, self.weights[self.weight_names[0]].parameters(base_layer)[0])

    def _share_stored_rows(self) -> None:
        """Lets adapters that are stored as rows have theirs in the bank, and not a second time."""
        shared = set()
        for key, resident in self.bank.residents.items():
            is_stored = len(key) == 1 and self.storage[key[0]] == "rows" and self.scale[key[0]] == 1
            # Not if the adapter got other rows since.
            if is_stored and resident.state is not None and resident.state == self._state(self._sources(key)):
                for name, rows in resident.rows.items():
                    buffers = getattr(self, f"{PREFIX}{name}_rows")
                    if buffers[key[0]] is not rows:
                        buffers[key[0]] = rows
                        shared.add(key[0])
        for key, resident in self.bank.residents.items():
            if shared.intersection(key):
                sources = self._sources(key)
                self.bank.put(key, resident.expert_ids, resident.rows, self._state(sources), sources)

    def _take_stored_rows_out(self, adapter_name: str) -> None:
        """Gives an adapter that is stored as rows memory of its own, before its place in the bank is given away."""
        resident = self.bank.residents.get((adapter_name,))
        for name, rows in {} if resident is None else resident.rows.items():
            buffers = self._tensors(f"{PREFIX}{name}_rows")
            if adapter_name in buffers and buffers[adapter_name] is rows:
                buffers[adapter_name] = rows.clone()

    def _sources(self, key: Key) -> list[Tensor]:
        """All tensors that the effective rows of some adapters depend on."""
        base = self.get_base_layer()
        deltas = [tensor for name in self.weight_names for own in key for tensor in self._adapter_tensors(name, own)]
        return [*(p for weight in self.weights.values() for p in weight.parameters(base)), *deltas]

    def _state(self, sources: list[Tensor]) -> list[Any] | None:
        """Something that differs after a change of a tensor; None if changes cannot be seen."""
        if any(source.is_inference() for source in sources):
            return None
        # Every in-place change raises a tensor's version, every replacement its address (or the tensor's identity).
        return [(id(s), s._version, s.data_ptr(), s.dtype, s.device) for s in sources]

    def _plain_deltas(self, key: Sequence[str]) -> dict[str, Tensor] | None:
        """The deltas of one adapter by weight name, if its effective rows are rows of stacked weights and these."""
        (name, *others) = key
        if others or self.storage[name] != "delta" or self.scaling[name] * self.scale[name] != 1:
            return None
        deltas = {weight: self._delta_parameters(weight, name) for weight in self.weight_names}
        is_plain = all(len(own) == 1 for own in deltas.values()) and all(
            isinstance(weight, StackedWeight) for weight in self.weights.values()
        )
        return {weight: own[0] for weight, own in deltas.items()} if is_plain else None

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Stores an adapter's deltas in the base's dtype, at the price of updates that its rounding swallows."""
        for name in self.weight_names:
            dtype = self._base_parameter(name).dtype
            for deltas in self._parameter_dicts(name):
                if adapter_name in deltas:
                    deltas[adapter_name] = deltas[adapter_name].to(dtype)
        self.forget_calls()

    def restore_stored_dtypes(self, adapter_name: str) -> None:
        """Undoes PEFT's cast of half-precision adapter weights to fp32: those stored so are not trained."""
        for name in self.weight_names:
            for suffix, dtype in (("_rows", self._base_parameter(name).dtype), ("_scales", torch.bfloat16)):
                buffers = getattr(self, f"{PREFIX}{name}{suffix}")
                if adapter_name in buffers:
                    buffers[adapter_name] = buffers[adapter_name].to(dtype)

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
        new_names = list(dict.fromkeys(check_adapters_to_merge(self, adapter_names)))
        if not new_names:
            return
        if safe_merge:
            self.check_finite(new_names)
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
            if rows is not None:
                rows = rows.to(self._base_parameter(weight_name))  # another dtype or device than when they were kept
            if new_ids or rows is None:  # the latter without new ones where other processes own the experts
                spare = self._spare_rows.get(weight_name)
                out = None if spare is None or rows is not None else spare[: len(new_ids)]
                new_rows = weight.read(self.get_base_layer(), new_ids, out=out)
                rows = new_rows if rows is None else torch.cat([rows, new_rows])
            originals[weight_name] = rows
            with_deltas = (
                self._with_deltas(rows, ids, weight_name, names) if known is None else known.rows[weight_name]
            )
            merged[weight_name] = with_deltas
        self._replaced_ids, self._replaced_rows, self._spare_rows = ids, originals, {}
        self.merged_adapters = merged_adapters
        self._write_rows(ids, merged)
        if known is not None and self.is_trained(names[0]):
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

    def merge_state(self) -> MergeState:
        """What `restore_merge` needs."""
        merged_rows = {}
        if self._replaced_ids:
            with onload_layer(self):
                base, ids = self.get_base_layer(), self._replaced_ids
                merged_rows = {name: weight.read(base, ids).detach() for name, weight in self.weights.items()}
        return MergeState(list(self.merged_adapters), self._replaced_ids, self._replaced_rows, merged_rows)

    @torch.no_grad()
    def restore_merge(self, state: MergeState) -> None:
        """Undoes merges and unmerges, also ones that came to an end in the middle."""
        has_begun = self._replaced_rows is not state.replaced_rows
        if has_begun or state.merged_rows:
            with onload_layer(self):
                self._write_rows(self._replaced_ids, self._replaced_rows)
                self._write_rows(state.replaced_ids, state.merged_rows)
        self.merged_adapters = list(state.adapters)
        self._replaced_ids, self._replaced_rows, self._spare_rows = state.replaced_ids, state.replaced_rows, {}
        self.prepare()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with the adapters merged into it if asked for."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    @torch.no_grad()
    def untrained_experts(self, adapter_name: str) -> list[int]:
        """Experts whose deltas are all zero: no token reached them in training; all of them before training.

        No expert is named where a process sees parts of the deltas only.
        """
        ids = self.expert_ids.get(adapter_name, [])
        deltas = [d for name in self.weight_names for d in self._delta_parameters(name, adapter_name)]
        if self.storage.get(adapter_name, "delta") != "delta" or any(map(is_spread, deltas)):
            return []
        moved = torch.zeros(len(ids), dtype=torch.bool)
        for name in self.weight_names:
            factors = self._delta_parameters(name, adapter_name)
            if factors:
                moved |= (factors[-1] != 0).flatten(1).any(1).cpu()
        return [expert for expert, has_moved in zip(ids, moved.tolist(), strict=True) if not has_moved]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_through(self.base_layer, *args, **kwargs)

    def forward_through(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of `base_layer`, this layer's or one tied to it, with the adapters that are asked for."""
        batch = None if self._disable_adapters else current_batch(base_layer)
        call = self.current_call() if batch is None else None
        if batch is None and call is None:
            return base_layer(*args, **kwargs)
        # The weights are read here and not by the module's own forward, around which accelerate loads them.
        with self._at_hand(base_layer):
            if batch is not None:
                return self._mixed_forward(base_layer, batch, *args, **kwargs)
            assert call is not None
            return self._adapted_forward(base_layer, call, *args, **kwargs)

    def current_call(self) -> AdapterCall | None:
        """What a call has to add, if anything. If adapters are disabled, merged ones are unmerged first."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        return self._call

    def _adapted_forward(self, base_layer: nn.Module, call: AdapterCall, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def plan_mixed(self, adapters: list[str]) -> MixedPlan:
        """Finds the rows of several adapters, of which each token will have one.

        Args:
            adapters: names; those without experts in this layer leave its tokens to the base.
        """
        with planning:
            for name in self.adapters_here(adapters):
                self.resident((name,), in_training=False)
            # Only now: making room for one may move the others.
            residents = [self.bank.residents.get((name,)) for name in adapters]
            known = self._plan
            if known is None or known.adapters != adapters or known.residents != residents:
                selections = [((), 0) if own is None else (own.expert_ids, own.place.start) for own in residents]
                slots = self._slots(selections, self.bank.capacity)
                self._plan = known = MixedPlan(list(adapters), residents, self.bank.tensors, slots)
        return known

    def check_mixes(self) -> None:
        """Refuses `adapter_names` where a layer's output does not show whose its rows are.

        Raises:
            ValueError: naming the container.
        """
        base: Any = self.get_base_layer()
        reason = None
        if self.kind == "stacked":
            reason = "does not keep a batch's tokens in order"
        elif isinstance(base, nn.ModuleList | nn.ModuleDict) and not overrides_forward(base):
            reason = "is called expert by expert"
        if reason is not None:
            raise ValueError(
                f"adapter_names is not supported by {self.path}: {type(base).__name__} {reason}. Call the model once "
                "for each adapter, after set_adapter(name)"
            )

    def _mixed_forward(self, base_layer: nn.Module, batch: AdapterBatch, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _add_delta(
        self, weight_name: str, suffix: str, adapter_name: str, shape: tuple[int, ...], *, zero: bool
    ) -> None:
        parameter = self._base_parameter(weight_name)
        # At least fp32: transformers attaches and loads adapters without asking PEFT to widen them.
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        device = compute_device(self.get_base_layer(), parameter)
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
        """Makes room for the tensors of an adapter that is stored in another form than deltas."""
        parameter = self._base_parameter(weight_name)
        device = compute_device(self.get_base_layer(), parameter)
        for suffix, (dtype, size) in stored_layout(self.storage[adapter_name], shape, parameter.dtype).items():
            tensor = torch.zeros(size, dtype=dtype, device=device)
            if suffix == "_rows" and parameter.device.type != "meta":
                tensor.copy_(self.weights[weight_name].read(self.get_base_layer(), self.expert_ids[adapter_name]))
            getattr(self, f"{PREFIX}{weight_name}{suffix}")[adapter_name] = tensor

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

    def _base_rows_of(self, rows: Tensor | None, ids: list[int], weight_name: str, own: list[int]) -> Tensor:
        """The base's rows of the experts `own`; from `rows` where it has them, since merging changes the base."""
        own_rows = self.weights[weight_name].read(self.get_base_layer(), own)
        for place, expert in enumerate(own):
            if rows is not None and expert in ids:
                own_rows[place] = rows[ids.index(expert)]
        return own_rows

    def _adapter_tensors(self, weight_name: str, adapter_name: str) -> list[Tensor]:
        """All tensors that an adapter's change of a weight depends on."""
        if self.storage[adapter_name] == "delta":
            return list(self._delta_parameters(weight_name, adapter_name))
        stored = (self._tensors(name) for name in self._stored_names[weight_name])
        return [tensors[adapter_name] for tensors in stored if adapter_name in tensors]

    def _parameter_dicts(self, weight_name: str) -> list[nn.ParameterDict]:
        return [self._tensors(name) for name in self._delta_names[weight_name]]

    def _all_tensors(self) -> list[Any]:
        """All dicts of tensors by adapter name."""
        return [self._tensors(name) for name in (*self.adapter_layer_names, *self.other_param_names)]

    def _tensors(self, name: str) -> Any:
        """A dict of tensors by adapter name, without the detours of a module's attributes."""
        return self._modules[name]

    def _delta_parameters(self, weight_name: str, adapter_name: str) -> list[nn.Parameter]:
        """An adapter's delta of a weight, or its factors A and B; none if it leaves the weight as it is."""
        return [deltas[adapter_name] for deltas in self._parameter_dicts(weight_name) if adapter_name in deltas]

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
            if self.storage[name] == "delta":
                delta = self.get_delta_weight(name, weight_name)
            else:
                delta = self._stored_delta(weight_name, name, self._base_rows_of(rows, ids, weight_name, own))
            if delta is None:
                continue
            places = [place for place, expert in enumerate(own) if expert in ids]
            if len(places) < len(own):
                delta = delta.index_select(0, expert_index(places, delta.device))
            positions = tuple(ids.index(own[place]) for place in places)
            exact = positions == tuple(range(len(ids)))
            deltas.append((None if exact else expert_index(positions, rows.device), delta))
        return add_deltas(rows, deltas)

    def _write_rows(self, ids: list[int], rows: dict[str, Tensor]) -> None:
        for weight_name, values in rows.items():
            self.weights[weight_name].write(self.get_base_layer(), ids, values)

    def _base_parameter(self, weight_name: str) -> nn.Parameter:
        return self.weights[weight_name].parameters(self.get_base_layer())[0]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own looks for `base_layer.weight`, which experts need not have, and casts to its dtype: that would
        # round the fp32 deltas of a half-precision base whenever an adapter is loaded with low_cpu_mem_usage.
        for weight_name in self.weight_names:
            parameter = self._base_parameter(weight_name)
            target = compute_device(self.get_base_layer(), parameter) if device is None else device
            for deltas in self._parameter_dicts(weight_name):
                if adapter_name in deltas and deltas[adapter_name].device != torch.device("meta"):
                    deltas[adapter_name] = deltas[adapter_name].to(target)
            for suffix in FROZEN_SUFFIXES:
                buffers = getattr(self, f"{PREFIX}{weight_name}{suffix}")
                if adapter_name in buffers and buffers[adapter_name].device != torch.device("meta"):
                    buffers[adapter_name] = buffers[adapter_name].to(target)
        self.forget_calls()

    def __repr__(self) -> str:
        # PEFT reads the layer's type from the part before the bracket.
        return "esft." + super().__repr__()


def _forget_calls(layer: ESFTLayer, incompatible_keys: Any) -> None:
    layer.forget_calls()


def overrides_forward(module: nn.Module) -> bool:
    """True if a list or dict of modules can be called."""
    return type(module).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)


def check_trainable(container: ExpertsContainer) -> None:
    """Refuses containers whose weights cannot be read as plain rows.

    Raises:
        NotImplementedError: for quantised, distributed, partly shared or offloaded weights.
    """
    if container.refusal is not None:
        raise NotImplementedError(f"{container.path} ({type(container.module).__name__}): {container.refusal}")
    if container.kind != "fused" and is_offloaded(container.module):
        raise NotImplementedError(
            f"{container.path} ({type(container.module).__name__}) is offloaded, which only fused experts can be; "
            "keep it on a device (device_map)"
        )
    for weight in container.weights:
        for parameter in weight.parameters(container.module):
            if isinstance(parameter, DTensor):
                raise NotImplementedError(
                    f"{container.path}.{weight.name} is a distributed tensor. Attach the adapter before FSDP shards "
                    "the model. Of tensor parallelism only plans that leave experts whole are supported: expert "
                    "parallelism, DistributedConfig(ep_size=...)."
                )
            if parameter.dtype not in READABLE_DTYPES:
                raise NotImplementedError(
                    f"{container.path}.{weight.name} has dtype {parameter.dtype}, a quantised form that cannot be "
                    f"read. Load the model in one of {[str(dtype) for dtype in READABLE_DTYPES]} (dtype=...; or "
                    "dequantize=True in its quantization config)."
                )
