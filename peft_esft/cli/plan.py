"""Defines `peft-esft plan`, which estimates the memory and communication of training."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("plan", help="memory and communication of training a model on some GPUs")
    parser.set_defaults(run=run, kinds={"model": ("model", "config")})
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("model", help="folder or Hub name of a model, or a config.json; no weights are read")
    add("--gpus", required=True, help="NUMBERxMEMORY, for example 8x80GB")
    add("--tokens", type=int, default=4096, help=f"on one GPU, in a forward pass {shown}")
    add("--share", type=float, default=0.1, help=f"of the routed experts that ESFT trains {shown}")
    add("--rank", type=int, default=16, help=f"of LoRA, for comparison {shown}")


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Estimates all methods on all engines, and recommends an engine."""
    from ..interchange.base import empty_model
    from ..scoring.memory_estimate import ModelSizes, Setup, format_plan, plan, recommended

    setup = Setup.parse(options.gpus, tokens=options.tokens, share=options.share, rank=options.rank)
    sizes = ModelSizes.of(empty_model(options.model))
    estimates = plan(sizes, setup)
    best = recommended(estimates, setup)
    record = {
        "model": asdict(sizes),
        "setup": asdict(setup),
        "estimates": [asdict(e) | {"total": e.total, "fits": e.fits(setup)} for e in estimates],
        "recommended": best.engine if best else None,
    }
    return record, format_plan(options.model, sizes, setup, estimates)
