"""Estimates the memory of a run of `peft-esft train`, from its options."""

from __future__ import annotations

import os
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from ..scoring.memory_estimate import OPTIMIZERS, Engine, Setup, estimate, num_trained
from ..scoring.model_sizes import ModelSizes
from .train_options import TrainOptions


def training_setup(
    own: TrainOptions, settings: SFTConfig, sizes: ModelSizes, tokens: int, element: int, **more: Any
) -> Setup:
    """The options as an estimate takes them. Optimizers that it does not know count as torch's AdamW.

    Args:
        own: the options of the command.
        settings: TRL's options.
        sizes: of the base.
        tokens: number of tokens in a batch.
        element: bytes of a weight of the base that is not in few bits.
        **more: other attributes of `Setup`.
    """
    base = Setup.base_of(sizes)
    if base == "bf16" and own.bits is not None:
        base = "nf4" if own.bits == 4 else "int8"
    elif base == "bf16" and element == 4:
        base = "fp32"
    engines: tuple[Engine, Engine] = ("DDP", "FSDP2")
    name = OptimizerNames(settings.optim).value
    optim = {"adamw_bnb_8bit": "adamw_8bit"}.get(name, name)
    return Setup(
        gpus=settings.world_size,
        tokens=tokens,
        rank=own.rank,
        base=base,
        optim=optim if optim in OPTIMIZERS else "adamw_torch",
        engine="one GPU" if settings.world_size == 1 else engines[os.environ.get("ACCELERATE_USE_FSDP") == "true"],
        accumulates=settings.gradient_accumulation_steps > 1,
        **more,
    )


def memory_of_training(
    own: TrainOptions, settings: SFTConfig, sizes: ModelSizes, trained: int, tokens: int, element: int
) -> float:
    """Estimates the bytes that one GPU holds, with gradient checkpointing. Under ZeRO it is those of DDP.

    `trained` is the number of trained parameters; `training_setup` describes the other arguments.
    """
    every = num_trained(sizes, Setup(share=1.0, rank=own.rank), "ESFT")
    setup = training_setup(own, settings, sizes, tokens, element, share=min(1.0, trained / every))
    return estimate(sizes, setup, "ESFT", setup.engine or "one GPU").total
