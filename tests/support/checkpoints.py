"""Bases and adapters on disk, and what lies in such folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from oracle import config_for


def randomize(model: torch.nn.Module, std: float = 0.05) -> None:
    """Gives every adapter of a model the same random deltas each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".esft_" in name:
                parameter.normal_(std=std)


def save_base_and_adapter(
    build: Callable[[], PreTrainedModel], folder: Path, shard_size: str = "20KB", **settings: object
) -> PeftModel:
    """Writes `folder/base` and `folder/adapter`, of random deltas; returns the model that carries the adapter."""
    build().save_pretrained(folder / "base", max_shard_size=shard_size)
    model = get_peft_model(build(), config_for(build(), **settings))
    randomize(model)
    model.base_model.model.name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, shard by shard."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
