"""Estimates the memory of a run of `peft-esft train`, from its options."""

from __future__ import annotations

from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from ..scoring.memory_estimate import OPTIMIZERS, BaseFormat, Setup, estimate, num_trained
from ..scoring.model_sizes import ModelSizes
from .train_options import TrainOptions


def training_setup(own: TrainOptions, settings: SFTConfig, tokens: int, element: int, **more: Any) -> Setup:
    """The options as an estimate takes them. Optimizers that it does not know count as torch's AdamW.

    Args:
        own: the options of the command.
        settings: TRL's options.
        tokens: number of tokens in a batch.
        element: bytes of a weight of the base that is not in few bits.
        **more: other attributes of `Setup`.
    """
    dense: BaseFormat = "fp32" if element == 4 else "bf16"
    name = OptimizerNames(settings.optim).value
    optim = {"adamw_bnb_8bit": "adamw_8bit"}.get(name, name)
    return Setup(
        gpus=settings.world_size,
        tokens=tokens,
        rank=own.rank,
        base=dense if own.bits is None else "int8" if own.bits == 8 else "nf4",
        optim=optim if optim in OPTIMIZERS else "adamw_torch",
        accumulates=settings.gradient_accumulation_steps > 1,
        **more,
    )


def memory_of_training(
    own: TrainOptions, settings: SFTConfig, sizes: ModelSizes, trained: int, tokens: int, element: int
) -> float:
    """Estimates the bytes that one GPU holds, with gradient checkpointing; each GPU has the whole model.

    Args:
        own: the options of the command.
        settings: TRL's options.
        sizes: of the base.
        trained: number of trained parameters.
        tokens: number of tokens in a batch.
        element: bytes of a weight of the base that is not in few bits.
    """
    every = num_trained(sizes, Setup(share=1.0, rank=own.rank), "ESFT")
    setup = training_setup(own, settings, tokens, element, share=min(1.0, trained / every))
    return estimate(sizes, setup, "ESFT", "one GPU" if setup.gpus == 1 else "DDP").total
