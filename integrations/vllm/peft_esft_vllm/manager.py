"""Which adapters are loaded, which slot each is in, and which slot each token of a step uses."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_file import digest
from .internals import WARMUP_PATH, LoRAAdapterNotFoundError, experts_of, get_adapter_absolute_path
from .rows import WEIGHTS, KernelRows, kernel_rows
from .settings import settings_of


class ESFTManager:
    """Stands in for the LoRA manager of vLLM's model runners. Its public methods are that manager's.

    Attributes:
        token_slots: `[max tokens of a step]`, int32, the slot of each token, 0 for the base. Its address is fixed.
    """

    is_enabled = True
    dummy_lora_cache = staticmethod(nullcontext)  # adapters for warm-up have no rows, so there is nothing to keep

    def __init__(self, model: nn.Module, vllm_config: Any, device: torch.device) -> None:
        self.settings, self.lora = settings_of(vllm_config), vllm_config.lora_config
        self.layers = experts_of(model)
        if other := [module for module in self.layers.values() if not hasattr(module, "esft_table")]:
            raise NotImplementedError(f"ESFT adapters cannot change experts of class {type(other[0]).__name__}")
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no routed experts that ESFT adapters could change")
        graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        size = max(vllm_config.scheduler_config.max_num_batched_tokens, graph)
        self.token_slots = torch.zeros(size, dtype=torch.int32, device=device)
        for layer in self.layers.values():
            identity = torch.arange(layer.global_num_experts, dtype=torch.int32, device=device)
            layer.esft_table, layer.esft_token_slots = identity.repeat(self.lora.max_loras + 1, 1), self.token_slots
        self._prefix_caching = vllm_config.cache_config.enable_prefix_caching
        self._loaded: OrderedDict[int, dict[str, KernelRows]] = OrderedDict()  # least recently used first, as slots
        self._slots: OrderedDict[int, int] = OrderedDict()  # from 1
        self._requests: dict[int, Any] = {}
        self._digests: dict[object, str] = {}
        self._pinned: set[int] = set()

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Prepares a step: the adapters of its tokens get slots, and each token its adapter's slot."""
        # vLLM's set holds one request per name: one that is unloaded and still runs may be missing.
        self._requests |= {request.lora_int_id: request for request in requests if request}
        wanted = set(mapping.index_mapping) - {0}
        if len(wanted) > self.lora.max_loras:
            raise RuntimeError(f"a step has tokens of {len(wanted)} adapters, but max_loras is {self.lora.max_loras}")
        for number in wanted:
            self._activate(number, wanted)
        slots = torch.tensor([self._slots[number] if number else 0 for number in mapping.index_mapping])
        self.token_slots[: len(slots)].copy_(slots, non_blocking=True)
        self.token_slots[len(slots) :].zero_()  # a CUDA graph's padding

    def add_adapter(self, request: Any) -> bool:
        """Loads an adapter into host memory.

        Raises:
            LoRAAdapterNotFoundError: if the folder or one of its files does not exist.
            ValueError: if the adapter is malformed, does not fit the model or the slots, or if other weights were
                served before under this name and path, or are to be replaced while requests may use them.
        """
        number = request.lora_int_id
        if number in self._loaded and not request.load_inplace:
            self._loaded.move_to_end(number)
            return True
        folder = Path(get_adapter_absolute_path(request.lora_path))
        try:
            self.settings.check(folder)
            content = digest(folder)
            self._check_unchanged(request, content)
            if number not in self._loaded:
                rows = kernel_rows(self.layers, folder)
                self._make_room()
                self._loaded[number] = rows
        except FileNotFoundError as error:
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path) from error
        self._requests[number] = request
        self._digests[number] = self._digests[request.lora_name, request.lora_path] = content
        return True

    def remove_adapter(self, number: int) -> bool:
        """Drops an adapter from host memory and from its slot."""
        self._slots.pop(number, None)
        self._pinned.discard(number)
        return self._loaded.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        """Drops all adapters."""
        for number in list(self._loaded):
            self.remove_adapter(number)

    def pin_adapter(self, number: int) -> bool:
        """Keeps an adapter from being dropped for another one."""
        self._pinned |= {number} & self._loaded.keys()
        return number in self._loaded

    def list_adapters(self) -> set[int]:
        """The numbers of the adapters in host memory."""
        return set(self._loaded)

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """ESFT's adapters for warm-up have no rank."""
        return default_rank

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Loads an adapter without rows, for warm-up."""
        self._loaded[request.lora_int_id] = {}
        return True

    def supports_tower_connector_lora(self) -> bool:
        """Only the language model's experts are adapted."""
        return False

    def _activate(self, number: int, wanted: set[int]) -> None:
        """Gives an adapter a slot, in place of the least recently used one that the step does not need."""
        if number not in self._loaded:
            request = self._requests[number]
            self.add_dummy_lora(request, 0) if request.lora_path == WARMUP_PATH else self.add_adapter(request)
        self._loaded.move_to_end(number)
        if number not in self._slots:
            free = set(range(1, self.lora.max_loras + 1)) - set(self._slots.values())
            if not free:
                free = {self._slots.pop(next(n for n in self._slots if n not in wanted | self._pinned))}
            self._slots[number] = min(free)
            self._write(min(free), self._loaded[number])
        self._slots.move_to_end(number)

    def _write(self, slot: int, rows: dict[str, KernelRows]) -> None:
        """Copies an adapter's rows into a slot of each layer, and fills in the slot's row of each table."""
        for name, layer in self.layers.items():
            table = layer.esft_table[slot]
            table.copy_(layer.esft_table[0])
            if name in rows:
                ids = rows[name].expert_ids.to(table.device)
                begin = layer.global_num_experts + (slot - 1) * layer.esft_width
                for weight, new in zip(WEIGHTS, rows[name].weights, strict=True):
                    getattr(layer, weight).data[begin : begin + len(ids)].copy_(new, non_blocking=True)
                table[ids] = torch.arange(begin, begin + len(ids), dtype=table.dtype, device=table.device)

    def _check_unchanged(self, request: Any, content: str) -> None:
        """Refuses weights that would share a number, or a prefix cache's key, with other ones."""
        keys = [request.lora_int_id] + [(request.lora_name, request.lora_path)] * bool(self._prefix_caching)
        if any(self._digests.get(key, content) != content for key in keys):
            raise ValueError(
                f"{request.lora_name!r} was loaded with other weights before. Running requests and the prefix cache "
                f"may still hold what those computed. Save the new weights to another folder than "
                f"{request.lora_path}, unload the adapter, and load it from there"
            )

    def _make_room(self) -> None:
        """Drops adapters from host memory: first those that are in no slot, the least recently used one first."""
        while len(self._loaded) >= self.lora.max_cpu_loras:
            candidates = [number for number in self._loaded if number not in self._pinned]
            self.remove_adapter(next((n for n in candidates if n not in self._slots), candidates[0]))
