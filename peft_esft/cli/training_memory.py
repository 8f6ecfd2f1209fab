"""Estimates the memory of a run of `peft-esft train`, from its options."""

from __future__ import annotations

from ..scoring.memory_estimate import ModelSizes, Setup, estimate
from .train_options import TrainOptions


STORED_BYTES = {4: 0.5 + 4 / 64, 8: 1.0}
"""Bytes of a stored weight by its bits: NF4 with a fp32 scale for each block of 64; int8, whose scales are few."""


def memory_of_training(own: TrainOptions, sizes: ModelSizes, trained: int, tokens: int, element: int) -> float:
    """Estimates the bytes that one GPU holds, with gradient checkpointing.

    Args:
        own: for the bits of the frozen experts.
        sizes: of the base.
        trained: number of trained parameters.
        tokens: number of tokens in a batch.
        element: bytes of a weight of the base that is not stored in few bits.
    """
    setup = Setup(gpus=1, memory=1, tokens=tokens, share=min(1.0, trained / sizes.experts), element=element)
    total = estimate(sizes, setup, "ESFT", "one GPU").total
    return total - (element - STORED_BYTES.get(own.bits or 0, element)) * sizes.experts
