"""Models on the simulated device, and what is done with them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from families import tiny_model
from oracle import config_for, random_tokens
from simulated_device import SimulatedDevice


DEVICE = "cuda:0"
LAYERS = 2
FEW, MANY = (2, 1), (12, 60)
"""Rows and length of a decoding step and of a prefill: 4 and 1,440 pairs of token and expert."""


def adapted(
    family: str = "olmoe",
    dtype: torch.dtype = torch.bfloat16,
    others: Sequence[str] = (),
    is_trained: bool = False,
    **settings: object,
) -> PeftModel:
    """A tiny model on the device with an adapter "default" that is active, and others."""
    base = tiny_model(family, dtype).to(DEVICE)
    kwargs = {"init_weights": False, "inference_mode": not is_trained, **settings}
    model = get_peft_model(base, config_for(base, **kwargs)).train(is_trained)
    for place, name in enumerate(others):
        model.add_adapter(name, config_for(base, [place, 7], **kwargs))
    model.base_model.set_adapter("default", inference_mode=not is_trained)
    return model


def run(model: nn.Module, size: tuple[int, int], **kwargs: object) -> Tensor:
    """A forward pass without gradients."""
    with torch.no_grad():
        return model(input_ids=random_tokens(*size).to(DEVICE), use_cache=False, **kwargs)[0]


def train(model: nn.Module, size: tuple[int, int]) -> None:
    """A training step without the optimizer's."""
    tokens = random_tokens(*size).to(DEVICE)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def waits_in(device: SimulatedDevice, call: Callable[[], object]) -> tuple[float, float]:
    """How often the host waits in a second call, for each layer: in all, and for the package alone."""
    call()
    device.reset()
    call()
    return sum(device.waits.values()) / LAYERS, sum(device.waits_of_package().values()) / LAYERS
