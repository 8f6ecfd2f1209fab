"""`ESFTLayer`: which adapters a forward pass uses; what all kinds of experts layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...moe.containers import ExpertsContainer
from ...moe.weights import StackedWeight, expert_index
from ..config import ESFTConfig
from ..mixed_batch import AdapterBatch, current_batch
from .adapter_tensors import PREFIX, AdapterState
from .calls import AdapterCall, MixedPlan
from .merging_layer import MergingLayer
from .offload import compute_device
from .resident import Key, Resident, planning


class ESFTLayer(MergingLayer):
    """An experts container whose forward pass uses the weights of the active adapters' experts."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        container: ExpertsContainer,
        expert_ids: Sequence[int],
        config: ESFTConfig,
    ) -> None:
        super().__init__(base_layer, adapter_name, container)
        self._call: AdapterCall | None = None
        self._calls: dict[Key, AdapterCall] = {}
        self._plan: MixedPlan | None = None
        self.in_features = self.out_features = container.hidden_size
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_through(self.base_layer, *args, **kwargs)

    def forward_through(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of `base_layer`, this layer's or one tied to it, with the adapters that are asked for."""
        batch = None if self._disable_adapters else current_batch()
        call = self.current_call()
        if batch is None and call is None:
            return base_layer(*args, **kwargs)
        # The weights are read here and not by the module's own forward, around which accelerate loads them.
        with self.at_hand(base_layer):
            if batch is not None:
                return self._mixed_forward(base_layer, batch, *args, **kwargs)
            assert call is not None
            return self._adapted_forward(base_layer, call, *args, **kwargs)

    def current_call(self) -> AdapterCall | None:
        """What a call has to add, if anything. If adapters are disabled, merged ones are unmerged first."""
        if self._disable_adapters and self.merged_adapters:
            with onload_layer(self):
                self.unmerge()
        return self._call

    def _adapted_forward(self, base_layer: nn.Module, call: AdapterCall, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def prepare(self) -> None:
        """Takes note of what a forward pass has to add; to be called whenever that changes."""
        is_off = self._disable_adapters or bool(self.merged_adapters)
        names = [] if is_off else self.adapters_here(self.active_adapters)
        self._call = self.call_of(tuple(names)) if names else None
        if self._call is not None and self._call.rows is not None and any(self.is_trained(name) for name in names):
            self._call.forget_rows()

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ESFTLayer:
        super()._apply(fn, recurse)
        self.forget_calls()
        return self

    def _forget_adapter(self, *adapter_names: str) -> None:
        """To be called whenever the rows of an adapter change."""
        with planning:
            for name in adapter_names:
                self._take_stored_rows_out(name)
                self.bank.remove_adapter(name)
        self.forget_calls()

    def weights_for(self, call: AdapterCall) -> tuple[dict[str, Tensor], bool]:
        """What the selected experts' weights are in a forward pass, `[n, ...]` by weight name.

        Returns:
            Effective rows and False; or, of adapters in training, their deltas and True.
        """
        if torch.compiler.is_compiling():
            # PEFT's `set_requires_grad` trains an adapter without a word to its layers; whether a parameter requires a
            # gradient is guarded.
            if call.rows is not None and any(delta.requires_grad for delta in call.parameters):
                call.forget_rows()
            if call.rows is not None:
                return call.rows, False
            if call.deltas is not None and self._knows_its_deltas():
                return call.deltas, True
        elif (resident := self.resident(call.key)) is not None:
            return resident.rows, False
        deltas = self._plain_deltas(call.key)
        if deltas is not None:
            if not torch.compiler.is_compiling():
                call.deltas = deltas  # lets go of those in whose place sharding has put others
            return deltas, True
        return {name: self.effective_rows(name, call.key) for name in self.weight_names}, False

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _knows_its_deltas(self) -> bool:
        """Whether the deltas that the active adapters' call knows are the layer's still, and whole.

        Sharding puts others in their place. Asked while a graph is made, and not in it, which would then depend on
        the adapters' names.
        """
        assert self._call is not None
        known, live = self._call.deltas or {}, self._plain_deltas(self._call.key) or {}
        return all(live.get(name) is delta and not isinstance(delta, DTensor) for name, delta in known.items())

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
            if key in self.bank.residents:
                with planning:
                    self.bank.remove(key)
            if key in self._calls and self._calls[key].rows is not None:
                self._calls[key].forget_rows()
            return None
        sources = self._sources(key)
        state = None if is_trained else self._state(sources)
        known = self.bank.residents.get(key)
        if known is None or known.state != state or state is None:
            known = self._make_resident(key, state, sources)
        if not is_trained:
            call = self.call_of(key)
            call.rows, call.parameters = known.rows, self._deltas_of(key)
        return known

    def _make_resident(self, key: Key, state: Any, sources: list[Tensor]) -> Resident:
        with planning:
            if len(key) > 1:
                for other in [other for other in self.bank.residents if len(other) > 1]:
                    self.bank.remove(other)
            # A tensor made in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad(), self.at_hand(self.get_base_layer()):
                rows = {name: self.effective_rows(name, key) for name in self.weight_names}
            self.bank.put(key, tuple(self.union_of_experts(key)), rows, state, sources)
            self._share_stored_rows()
        return self.bank.residents[key]

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

    def adapter_state(self, adapter_name: str, *, copy: bool) -> AdapterState:
        """What `restore_adapter` needs; with `copy` also the values of the parameters."""
        state = super().adapter_state(adapter_name, copy=copy)
        # Rows of the adapter may lie in the bank, where nothing else is to be put as long as they may come back.
        return replace(state, resident=self.bank.residents.get((adapter_name,)))

    def _take_stored_rows_out(self, adapter_name: str) -> None:
        """Gives an adapter that is stored as rows memory of its own, before its place in the bank is given away."""
        for name, bank in self.bank.tensors.items():
            buffers = self._tensors(f"{PREFIX}{name}_rows")
            if adapter_name not in buffers:
                continue
            rows = buffers[adapter_name]
            if rows.untyped_storage().data_ptr() == bank.untyped_storage().data_ptr():
                with torch.inference_mode(False), torch.no_grad():
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
            if known is None or known.residents != residents:
                selections = [((), 0) if own is None else (own.expert_ids, own.place.start) for own in residents]
                slots = self._slots(selections, self.bank.capacity)
                self._plan = known = MixedPlan(residents, self.bank.tensors, slots)
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

    def __repr__(self) -> str:
        # PEFT reads the layer's type from the part before the bracket.
        return "esft." + super().__repr__()


def _forget_calls(layer: ESFTLayer, incompatible_keys: Any) -> None:
    layer.forget_calls()


def overrides_forward(module: nn.Module) -> bool:
    """True if a list or dict of modules can be called."""
    return type(module).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)
