"""Defines `peft-esft plan`, which estimates the memory and communication of training."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..scoring.memory_estimate import (  # which loads no torch
    OPTIMIZERS,
    Estimate,
    Setup,
    describe,
    fits_on_gpus,
    plan,
    recommended,
    what_would_fit,
)
from ..scoring.model_sizes import ModelSizes
from .select import BASES, METRICS


SHOWN = 5  # ways to fit


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("plan", help="memory and communication of training a model on some GPUs")
    parser.set_defaults(run=run, kinds={"model": ("model", "config"), "experts": ("scores",)})
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("model", help="folder or Hub name of a model, or a config.json; no weights are read")
    add("--gpus", required=True, nargs="+", help="MEMORY or NUMBERxMEMORY, for example 24GB or 8x80GB; several plans")
    add("--tokens", type=int, default=4096, help=f"on one GPU, in a forward pass {shown}")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--share", type=float, default=0.1, help=f"of the routed experts that ESFT trains {shown}")
    share.add_argument(
        "--experts", metavar="FILE", type=Path, help="scores to select by; the share is the selection's"
    )
    add("--metric", choices=METRICS, help="which score selects, with --experts (default: token)")
    add("--top-p", type=float, help="share to cover in each layer, with --experts (default: 0.2, for gate 0.1)")
    add("--rank", type=int, default=16, help=f"of LoRA, and of ESFT's deltas in rows of their own {shown}")
    add("--base", choices=BASES, default="bf16", help=f"form of the base as it is loaded {shown}")
    add("--optim", choices=OPTIMIZERS, nargs="+", default=["adamw_torch"], help=f"as in TrainingArguments {shown}")
    add("--gradient-accumulation-steps", type=int, default=1, help=f"above 1, gradients are kept {shown}")


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Estimates all methods on all engines for each of the GPUs, and recommends an engine."""
    from ..interchange.base import empty_model

    if options.experts is None and (options.top_p is not None or options.metric is not None):
        raise ValueError("--top-p and --metric select from scores: name them with --experts, or give --share")
    model = empty_model(options.model)
    sizes = ModelSizes.of(model)
    settings = {
        "tokens": options.tokens,
        "share": options.share if options.experts is None else _share_of_selection(options, model),
        "rank": options.rank,
        "lora_rank": options.rank,
        "base": options.base,
        "optim": options.optim[0],
        "accumulates": options.gradient_accumulation_steps > 1,
    }
    plans, texts = [], [describe_model(options.model, sizes)]
    for gpus in options.gpus:
        setup = Setup.parse(gpus, **settings)
        estimates = plan(sizes, setup, options.optim)
        best = recommended(estimates)
        asked = replace(setup, rank=None)
        ways = [] if fits_on_gpus(sizes, asked) else what_would_fit(sizes, asked)
        plans.append(
            {
                "setup": asdict(setup),
                "estimates": list(map(_record, estimates)),
                "recommended": _record(best) if best else None,
                "would_fit": list(map(_record, ways)),
            }
        )
        texts.append(format_plan(sizes, setup, estimates, best, ways))
    return {"model": asdict(sizes), "plans": plans}, "\n\n".join(texts)


def _share_of_selection(options: argparse.Namespace, model: Any) -> float:
    from ..scoring.scores import ExpertScores
    from ..scoring.selection import select_experts

    scores = ExpertScores.load(options.experts)
    scores.check_fits(model)
    selection = select_experts(scores, metric=options.metric or "token", top_p=options.top_p)
    sizes = scores.parameters_per_expert()
    total = sum(c.num_experts * c.parameters_per_expert for c in scores.containers.values())
    return sum(len(ids) * sizes[path] for path, ids in selection.items()) / total


def _record(own: Estimate) -> dict[str, Any]:
    return asdict(own) | {"total": own.total, "fits": own.fits}


def describe_model(name: str, sizes: ModelSizes) -> str:
    """Says how large a model is."""
    return (
        f"{name}: {sizes.total / 1e9:.1f} G parameters, {sizes.experts / sizes.total:.0%} in routed experts "
        f"({sizes.num_moe_layers} layers of {sizes.num_experts}, {sizes.top_k} for each token)"
    )


def format_plan(
    sizes: ModelSizes, setup: Setup, estimates: Iterable[Estimate], best: Estimate | None, ways: list[Estimate]
) -> str:
    """Writes a plan as a table in plain text, with what is recommended or would fit."""
    trained = setup.share * sizes.experts / 1e9
    lines = [
        f"{setup.gpus} x {setup.memory / 1e9:g} GB, {setup.tokens} tokens on each, gradient checkpointing; ESFT of "
        f"{setup.share:.1%} of the experts ({trained:.2f} G at full rank)",
        "",
        "engine   method          rank  weights  optimizer            base   state  gathered  activations    total GB"
        "  fits  GB sent per step",
    ]
    for own in estimates:
        values = (own.base, own.state, own.gathered, own.activations, own.total, own.sent)
        base, state, gathered, activations, total, sent = (value / 1e9 for value in values)
        mark = "yes" if own.fits else "no"
        lines.append(
            f"{own.engine:<8} {own.method:<14} {_rank(own) or '-':>5}  {own.setup.base:<7}  {own.setup.optim:<17}"
            f"{base:>8.1f}{state:>8.1f}{gathered:>10.1f}{activations:>13.1f}{total:>12.1f}  {mark:<4} {sent:>17.1f}"
        )
    lines += ["", "full: weights, gradients and both moments are in the precision of the column weights"]
    if best is not None:
        lines.append(f"recommended for ESFT: {describe(best, sizes)}")
    if ways:
        lines.append(f"ESFT at full rank over {setup.base} weights does not fit. What would, with the fewest changes:")
        lines += [f"  {describe(way, sizes)}" for way in ways[:SHOWN]]
    elif best is None:
        lines.append("ESFT does not fit, not even with one expert in each layer, in 4 bits and of low rank")
    return "\n".join(lines)


def _rank(own: Estimate) -> int | None:
    return {"ESFT": own.setup.rank, "full": None}.get(own.method, own.setup.lora_rank)
