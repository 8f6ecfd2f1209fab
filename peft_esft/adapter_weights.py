"""`AdapterWeights`: the tensors of each adapter of one experts layer, and the effective rows that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .combination import CombinationType, MajoritySignMethod, combine_deltas
from .config import ESFTConfig
from .containers import ExpertsContainer
from .deltas import add_deltas, rows_with_delta
from .offload import at_hand, compute_device
from .storage import FROZEN_SUFFIXES, decode, stored_layout
from .weights import ExpertWeight, StackedWeight, expert_index, is_spread


PREFIX = "esft_"


@dataclass(frozen=True, eq=False)
class AdapterState:
    """All that a layer has of an adapter.

    Attributes:
        tensors: one for each dict of tensors, None where it has none, and whether it is trained.
        values: copies of them, if asked for.
        settings: one for each dict of settings; empty if it has none.
        resident: holds the adapter's place in the bank, if it has one.
    """

    tensors: list[tuple[Tensor, bool] | None]
    values: list[Tensor | None]
    settings: list[Any]
    resident: Any = None


class AdapterWeights(nn.Module, BaseTunerLayer):
    """An experts container and, for each adapter, deltas on the weights of that adapter's experts.

    For every weight `w [E, ...]` of the container there is a `ParameterDict` `esft_w` that holds, by adapter name, a
    delta `[n, ...]` in the order of the adapter's expert ids. An adapter with a rank holds two factors of it instead,
    `esft_w_B [n, out, rank]` and `esft_w_A [n, rank, in]`. One whose file is stored in another form (`storage.py`)
    holds the file's tensors as buffers. What a forward pass does with them is the business of `layer.ESFTLayer`.
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
        self._active_adapter = adapter_name

    def forget_calls(self) -> None:
        """To be called whenever the tensors of an adapter were replaced, or their device changed."""
        raise NotImplementedError

    def _forget_adapter(self, *adapter_names: str) -> None:
        """To be called whenever the rows of an adapter change."""
        raise NotImplementedError

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
        self._forget_adapter(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.discard_adapter(adapter_name)

    def discard_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and leaves the choice of the active ones as it is."""
        for tensors in self._all_tensors():
            if adapter_name in tensors:
                del tensors[adapter_name]
        for settings in self._settings():
            settings.pop(adapter_name, None)
        self._forget_adapter(adapter_name)

    def adapter_state(self, adapter_name: str, *, copy: bool) -> AdapterState:
        """What `restore_adapter` needs; with `copy` also the values of the parameters."""
        # PEFT's dict of buffers has no `get`.
        own = [
            tensors[adapter_name] if adapter_name in tensors else None  # noqa: SIM401
            for tensors in self._all_tensors()
        ]
        return AdapterState(
            [None if tensor is None else (tensor, tensor.requires_grad) for tensor in own],
            [tensor.detach().clone() if copy and isinstance(tensor, nn.Parameter) else None for tensor in own],
            [settings[adapter_name] for settings in self._settings() if adapter_name in settings],
        )

    @torch.no_grad()
    def restore_adapter(self, adapter_name: str, state: AdapterState) -> None:
        """Gives an adapter back what it had, in its old place among the others."""
        for tensors, own, value in zip(self._all_tensors(), state.tensors, state.values, strict=True):
            if own is not None:
                tensor, is_trained = own
                tensors[adapter_name] = tensor.requires_grad_(is_trained)
                if value is not None:
                    tensor.data.copy_(value)
            elif adapter_name in tensors:
                del tensors[adapter_name]
        for place, settings in enumerate(self._settings()):
            if state.settings:
                settings[adapter_name] = state.settings[place]
            else:
                settings.pop(adapter_name, None)
        self._forget_adapter(adapter_name)

    def replace_adapter(self, adapter_name: str, incoming: str, is_trained: bool) -> None:
        """Gives an adapter the experts and weights of another one, which ends; either may have none in this layer."""
        for tensors in self._all_tensors():
            old = tensors[adapter_name] if adapter_name in tensors else None  # noqa: SIM401 (not all have `get`)
            new = tensors.pop(incoming) if incoming in tensors else None
            if new is None:
                if old is not None:
                    del tensors[adapter_name]
                continue
            if isinstance(new, nn.Parameter):
                if old is not None and old.shape == new.shape and old.dtype == new.dtype:
                    old.data.copy_(new.data)
                    new = old
                new.requires_grad_(is_trained)
            tensors[adapter_name] = new
        for settings in self._settings():
            if incoming in settings:
                settings[adapter_name] = settings.pop(incoming)
            else:
                settings.pop(adapter_name, None)
        self._forget_adapter(adapter_name, incoming)

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
        """Refuses adapters whose merged rows would not be finite.

        Raises:
            ValueError: naming the adapter.
        """
        with self.at_hand(self.get_base_layer()):
            for adapter_name in self.adapters_here(adapter_names):
                for weight_name in self.weight_names:
                    if not bool(torch.isfinite(self.effective_rows(weight_name, [adapter_name])).all()):
                        raise ValueError(
                            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken "
                            f"(in {weight_name} of {self.path})"
                        )

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Stores an adapter's deltas in the base's dtype, at the price of updates that its rounding swallows."""
        for name in self.weight_names:
            dtype = self._base_parameter(name).dtype
            for deltas in self._parameter_dicts(name):
                if adapter_name in deltas:
                    delta = deltas[adapter_name]
                    deltas[adapter_name] = nn.Parameter(delta.detach().to(dtype), requires_grad=delta.requires_grad)
        self.forget_calls()

    def restore_stored_dtypes(self, adapter_name: str) -> None:
        """Undoes PEFT's cast of half-precision adapter weights to fp32: those stored so are not trained."""
        for name in self.weight_names:
            for suffix, dtype in (("_rows", self._base_parameter(name).dtype), ("_scales", torch.bfloat16)):
                buffers = getattr(self, f"{PREFIX}{name}{suffix}")
                if adapter_name in buffers:
                    buffers[adapter_name] = buffers[adapter_name].to(dtype)

    def _settings(self) -> list[dict[str, Any]]:
        """What is kept of each adapter beside its tensors."""
        return [self.expert_ids, self.scaling, self.scale, self.storage]

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
                    delta = deltas[adapter_name]
                    deltas[adapter_name] = nn.Parameter(delta.detach().to(target), requires_grad=delta.requires_grad)
            for suffix in FROZEN_SUFFIXES:
                buffers = getattr(self, f"{PREFIX}{weight_name}{suffix}")
                if adapter_name in buffers and buffers[adapter_name].device != torch.device("meta"):
                    buffers[adapter_name] = buffers[adapter_name].to(target)
        self.forget_calls()
