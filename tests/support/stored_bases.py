"""The oracle of experts in few bits: a dense model that holds the same numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from peft_esft import find_experts, quantize_experts
from peft_esft.moe.weights import StackedWeight

from zoo import VARIANTS, family, model_types


FUSED = [name for name in [*model_types(), *VARIANTS] if family(name).group in "AB"]
TYPICAL = ["deepseek_v2", "gpt_oss", "longcat_flash", "nemotron_h", "olmoe"]
"""Plain, transposed with biases, with identity experts, without a gate, and the embedded model's."""


def quantised(model: nn.Module, bits: int, form: str, **settings: object) -> nn.Module:
    """The model with its experts in a form: "nf4" or "fp4", or these with " double" for quantised scales."""
    quant_type, _, double = form.partition(" ")
    return quantize_experts(model, bits=bits, quant_type=quant_type, double_quant=bool(double), **settings)


def dense_twin(plain: nn.Module, quantised: nn.Module) -> nn.Module:
    """A copy of `plain` whose experts hold what those of `quantised` are dequantised to."""
    twin = copy.deepcopy(plain)
    containers = find_experts(quantised)
    for path, container in find_experts(twin).items():
        for weight in container.weights:
            assert type(weight) is StackedWeight
            weight.whole(container.module).data.copy_(dense(containers[path], weight.name))
    return twin


@torch.no_grad()
def dense(container: object, name: str) -> Tensor:
    """A weight of a container, `[E, ...]`, dequantised."""
    (weight,) = [weight for weight in container.weights if weight.name == name]
    return weight.read(container.module, range(container.num_experts))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """True if two tensors are equal in every bit, and not only in value."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )
