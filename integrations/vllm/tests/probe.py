"""Looks into the workers of an engine, and swaps adapters there."""

from __future__ import annotations

import hashlib

import torch
from peft_esft_vllm.swap import ESFTSwap


class Probe(ESFTSwap):
    """Methods for `collective_rpc`."""

    def probe_base(self) -> str:
        """A hash of all weights of the base, without slots."""
        content = hashlib.sha256()
        for _, module in sorted(self.get_model().named_modules()):
            for _, parameter in sorted(module.named_parameters(recurse=False)):
                experts = getattr(module, "esft_table", None) is not None
                own = parameter.data[: module.global_num_experts] if experts else parameter.data
                content.update(own.contiguous().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()

    def probe_record(self) -> None:
        """From now on notes which adapters each step mixes."""
        manager, self.probe_steps = self.model_runner.lora_manager, []
        original = manager.set_active_adapters

        def recorded(requests, mapping):
            self.probe_steps.append(sorted(set(mapping.index_mapping)))
            return original(requests, mapping)

        manager.set_active_adapters = recorded

    def probe_mixed(self) -> int:
        """The largest number of different adapters, the base among them, of one step."""
        return max(len(step) for step in self.probe_steps)

    def probe_send_all_to_slot(self, slot: int) -> None:
        """Breaks the engine: all tokens go through one slot."""
        manager = self.model_runner.lora_manager
        original = manager.set_active_adapters

        def broken(requests, mapping):
            original(requests, mapping)
            manager.token_slots.fill_(slot)

        manager.set_active_adapters = broken

    def probe_shapes(self) -> list[int]:
        """Rows of each layer's experts, slots included."""
        return [layer.w13_weight.shape[0] for layer in self.model_runner.lora_manager.layers.values()]
