"""`AdapterTensors`: the tensors of each adapter of one experts layer, kept by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...moe.containers import ExpertsContainer
from ...moe.weights import ExpertWeight
from ...ops.encodings import FROZEN_SUFFIXES, stored_layout
from ..config import ESFTConfig
from .offload import compute_device


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


class AdapterTensors(nn.Module, BaseTunerLayer):
    """An experts container and, for each adapter, deltas on the weights of that adapter's experts.

    For every weight `w [E, ...]` of the container there is a `ParameterDict` `esft_w` that holds, by adapter name, a
    delta `[n, ...]` in the order of the adapter's expert ids. An adapter with a rank holds two factors of it instead,
    `esft_w_B [n, out, rank]` and `esft_w_A [n, rank, in]`. One whose file is stored in another form (`storage.py`)
    holds the file's tensors as buffers. What they amount to is the business of `adapter_weights.AdapterWeights`.
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
            _remove(tensors, adapter_name)
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
            else:
                _remove(tensors, adapter_name)
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

    def tensors_of(self, adapter_name: str) -> dict[str, Tensor]:
        """An adapter's tensors, by the names that they have in its file after the layer's path."""
        names = (*self.adapter_layer_names, *self.other_param_names)
        return {name: self._tensors(name)[adapter_name] for name in names if adapter_name in self._tensors(name)}

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

    def _all_tensors(self) -> list[Any]:
        """All dicts of tensors by adapter name."""
        return [self._tensors(name) for name in (*self.adapter_layer_names, *self.other_param_names)]

    def _parameter_dicts(self, weight_name: str) -> list[nn.ParameterDict]:
        return [self._tensors(name) for name in self._delta_names[weight_name]]

    def _tensors(self, name: str) -> Any:
        """A dict of tensors by adapter name, without the detours of a module's attributes."""
        return self._modules[name]

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


def _remove(tensors: Any, adapter_name: str) -> None:
    """Removes an adapter's tensor, if it has one."""
    if adapter_name in tensors:
        # torch notes a key before it takes the parameter, and may have been interrupted in between.
        with suppress(AttributeError):
            del tensors[adapter_name]
