"""The ways to train that the benchmarks compare, as whole models, each from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OlmoeForCausalLM

from peft_esft import ESFTConfig, find_experts

from layer_step import ModuleExperts, masked


def selection_of(model: OlmoeForCausalLM, trained: int) -> dict[str, list[int]]:
    """Evenly spaced experts, the same number in each layer."""
    return {
        path: list(range(0, container.num_experts, container.num_experts // trained))[:trained]
        for path, container in find_experts(model).items()
    }


def _full(model: OlmoeForCausalLM, selection: dict[str, list[int]]) -> nn.Module:
    model.set_experts_implementation("grouped_mm")
    return model


def _full_eager(model: OlmoeForCausalLM, selection: dict[str, list[int]]) -> nn.Module:
    model.set_experts_implementation("eager")
    return model


def _esft(model: OlmoeForCausalLM, selection: dict[str, list[int]]) -> nn.Module:
    return get_peft_model(model, ESFTConfig(target_experts=selection))


def _mask(model: OlmoeForCausalLM, selection: dict[str, list[int]]) -> nn.Module:
    model.requires_grad_(False)
    for path, experts in selection.items():
        masked(model.get_submodule(path).requires_grad_(), experts)
    return model


def _lora(model: OlmoeForCausalLM, selection: dict[str, list[int]]) -> nn.Module:
    names = [f"{path}.{name}" for path in selection for name in ("gate_up_proj", "down_proj")]
    return get_peft_model(model, LoraConfig(r=16, target_parameters=names))


def _modules(model: OlmoeForCausalLM, selection: dict[str, list[int]]) -> nn.Module:
    model.requires_grad_(False)
    for path, experts in selection.items():
        model.set_submodule(path, ModuleExperts(model.get_submodule(path), experts))
    return model


MASTERED = "full, fp32 master"
WAYS: dict[str, Callable[[OlmoeForCausalLM, dict[str, list[int]]], nn.Module]] = {
    "ESFT": _esft,
    "full": _full,
    "full, eager": _full_eager,
    MASTERED: _full,
    "mask": _mask,
    "LoRA r 16": _lora,
    "modules": _modules,
}
NOTE = (
    "full: all parameters, transformers' grouped_mm. full, fp32 master: AdamW on fp32 copies of half-precision "
    "weights, the like of ESFT's fp32 deltas. mask: full gradients of the fused experts, unselected rows set to zero. "
    "LoRA: PEFT's on all experts through target_parameters. modules: one module for each expert, the selected ones "
    "trained in place."
)


class TrainingStep:
    """Forward, backward and AdamW step of one way to train.

    Args:
        way: a key of `WAYS`.
        base: the weights to start from; not changed.
        trained: how many experts of each layer are selected.
        tokens: int64 `[rows, length]`.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self, way: str, base: OlmoeForCausalLM, trained: int, tokens: torch.Tensor, checkpointing: bool
    ) -> None:
        model = copy.deepcopy(base).train()
        self.model = WAYS[way](model, selection_of(base, trained))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float() for parameter in self.parameters] if way == MASTERED else []
        self.optimizer = torch.optim.AdamW(self.masters or self.parameters, lr=1e-5)
        self.tokens = tokens

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        for master, parameter in zip(self.masters, self.parameters, strict=False):
            master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=False):
                parameter.copy_(master)
