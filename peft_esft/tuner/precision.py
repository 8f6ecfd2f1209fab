"""Gives deltas their dtype back where a trainer has narrowed them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from .layers.layer import ESFTLayer


def restore_before_training(model: nn.Module, layers: Sequence[ESFTLayer]) -> None:
    """Widens trained deltas again if TRL has cast them.

    TRL's trainers cast all trained weights to bf16 if bitsandbytes has loaded a part of the base in 4 or 8 bits. Steps
    that are small beside a delta would then be rounded away.

    Raises:
        ValueError: if there are several processes: what wraps the model has already shared out the deltas as they are.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if any(_narrowed(layers)):
            raise ValueError(
                "the trainer has cast the deltas to a narrower dtype, as TRL does if the base is loaded in 4 or "
                "8 bits, and they are sharded already. Call trainer.model.base_model.restore_delta_dtype() on "
                "each process after the trainer is made and before trainer.train()"
            )
        return
    restore_delta_dtype(layers)


@torch.no_grad()
def restore_delta_dtype(layers: Sequence[ESFTLayer]) -> None:
    """Widens trained deltas that are narrower than they were created, and warns if values were rounded.

    Deltas that were asked for in the base's dtype (`autocast_adapter_dtype=False`) stay as they are. The parameters
    stay the same objects, so an optimizer that has them goes on.
    """
    rounded = False
    for delta, dtype in _narrowed(layers):
        rounded |= bool(delta.any())
        delta.data = delta.data.to(dtype)
    if rounded:
        warnings.warn(
            "the trainer has rounded the deltas to a narrower dtype, as TRL does if the base is loaded in 4 or 8 "
            "bits. Training goes on in full precision. To keep trained deltas exact, load the adapter after the "
            "trainer is made",
            stacklevel=3,
        )


def _narrowed(layers: Sequence[ESFTLayer]) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    for layer in layers:
        for adapter, record in layer.adapters.items():
            for name in layer.weights if not record.in_base_dtype else ():
                dtype = layer.delta_dtype(name)
                for delta in layer.delta_parameters(name, adapter):
                    if delta.requires_grad and delta.dtype.itemsize < dtype.itemsize:
                        yield delta, dtype
