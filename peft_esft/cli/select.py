"""Defines `peft-esft select`, which chooses experts from scores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..scoring.memory_estimate import BASE_FORMATS, OPTIMIZERS, Setup  # which loads no torch
from .kinds import ADAPTER_CONFIG


METRICS = ("token", "gate", "gate_share")
"""The values of `scoring.scores.Metric`; named here too, so that `--help` need not load torch."""
BASES = tuple(form for form in BASE_FORMATS if form != "mxfp4")
"""MXFP4 is read from the checkpoint, not asked for."""
MEMORY: dict[str, tuple[type, Any, Sequence[str] | None]] = {
    "tokens": (int, 4096, None),
    "base": (str, "the form that was scored", BASES),
    "optim": (str, "adamw_torch", OPTIMIZERS),
}
"""Type, default and values of the options that a budget of memory has."""
BAR_WIDTH = 32


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("select", help="choose experts from scores")
    parser.set_defaults(run=run, kinds={"scores": ("scores",)})
    add = parser.add_argument
    add("scores", type=Path, help="file written by `peft-esft score`")
    add("--metric", choices=METRICS, default="token", help="which score (default: %(default)s)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--top-p", type=float, help="share to cover in each layer (default: 0.2, for gate 0.1)")
    how.add_argument("--top-k", type=int, help="the same number of experts in every layer")
    how.add_argument("--budget", help="share of all experts' parameters, or memory of GPUs: 24GB, 2x24GB")
    how.add_argument("--preview", action="store_true", help="only show what several values of --top-p would cost")
    add("--min-experts", type=int, default=1, help="at least so many in each layer")
    add("--max-experts", type=int, help="at most so many in each layer")
    add("--rank", type=int, help="rank of the deltas (default: full rank)")
    add("--out", type=Path, help="folder for an adapter_config.json with the selection")
    group = parser.add_argument_group("what memory is filled with, as in `peft-esft plan`")
    for name, (kind, default, choices) in MEMORY.items():
        group.add_argument(f"--{name}", type=kind, choices=choices, help=f"(default: {default})")


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Chooses experts; shows them, or writes a config with them."""
    from ..scoring.preview import format_previews, preview_selections
    from ..scoring.scores import ExpertScores
    from ..scoring.selection import select_experts
    from ..tuner.config import ESFTConfig

    scores, out = ExpertScores.load(options.scores), options.out
    if options.preview:
        fixed = ("out", "max_experts", "rank", *MEMORY)
        given = [option for option in fixed if getattr(options, option) is not None]
        if given := given + ["min_experts"] * (options.min_experts != 1):
            shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--preview only compares values of --top-p; leave out {shown}")
        previews = preview_selections(scores, metric=options.metric)
        return [asdict(preview) for preview in previews], format_previews(previews)
    if out is not None:
        _check_config_folder(out)
    most = max(container.num_experts for container in scores.containers.values())
    if options.top_k is not None and options.top_k > most:
        raise ValueError(f"--top-k is {options.top_k}, and no layer has more than {most} experts")
    names = ("metric", "top_p", "top_k", "min_experts", "max_experts")
    settings = {name: getattr(options, name) for name in names} | {"budget": _budget(options, scores)}
    selection = select_experts(scores, **settings)
    text = bars({path: (len(ids), scores.containers[path].num_experts) for path, ids in selection.items()})
    if out is not None:
        ESFTConfig.from_scores(
            scores,
            base_model_name_or_path=scores.model,
            task_type=_task_type(scores.model),
            rank=options.rank,
            **settings,
        ).save_pretrained(str(out))
        text += f"\nwritten to {out}/{ADAPTER_CONFIG}; load it with ESFTConfig.from_pretrained"
    return selection, text


def read_budget(text: str | float | None) -> str | float | None:
    """A share of the experts as a number; memory, which has a unit, as it is."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _budget(options: argparse.Namespace, scores: Any) -> Any:
    """The budget: a share, or a `Setup`."""
    budget = read_budget(options.budget)
    given = {name: getattr(options, name) for name in MEMORY if getattr(options, name) is not None}
    if isinstance(budget, str):
        return Setup.parse(budget, scores.sizes, rank=options.rank, **given)
    if given:
        raise ValueError(f"--{', --'.join(given)} is only for a budget of memory, as in --budget 24GB")
    return budget


def _task_type(model: str | None) -> str | None:
    """PEFT's task type for the model that was scored, if it can still be found."""
    from ..interchange.base import empty_model, task_type_of

    try:
        return None if model is None else task_type_of(empty_model(model))
    except (OSError, ValueError):
        return None


def _check_config_folder(folder: Path) -> None:
    from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out is {folder}, a file; it is the folder for an {ADAPTER_CONFIG}")
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} holds a trained adapter ({name}), which would lose its config; give another --out"
            )


def bars(counts: dict[str, tuple[int, int]]) -> str:
    """Draws a bar chart in plain text: for each path a line with a bar for `(count, most)`."""
    width = max(map(len, counts), default=0)
    return "\n".join(
        f"{path:<{width}}  {'#' * max(1, round(BAR_WIDTH * count / most)):<{BAR_WIDTH}}  {count}"
        for path, (count, most) in counts.items()
    )
