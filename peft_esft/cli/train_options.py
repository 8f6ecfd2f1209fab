"""Parses the arguments of `peft-esft train`: its own, and every field of TRL's `SFTConfig` by its name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from trl import SFTConfig, TrlParser

from ..scoring.memory_size import bytes_of
from ..scoring.scores import Metric
from .base_options import DTYPES
from .select import read_budget


PAPER_LEARNING_RATE = 1e-5
WAYS = ("esft", "lora", "full")


@dataclass
class TrainOptions:
    """What `peft-esft train` takes beside `SFTConfig`; names that TRL's scripts have too mean the same there.

    `train.OWN` has their texts for `--help`, which loads neither TRL nor torch.
    """

    program: ClassVar[str] = "peft-esft train"
    model_name_or_path: str | None = None
    model_revision: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    eval: str | None = None
    columns: list[str] = field(default_factory=list)
    experts: str | None = None
    metric: Metric = "token"
    top_p: float | None = None
    budget: str | None = None
    score_tokens: int = 131_072
    rank: int | None = None
    bits: int | None = None
    resume: bool = False
    dry_run: bool = False


@dataclass
class CompareOptions(TrainOptions):
    """What `peft-esft compare` takes beside `SFTConfig`."""

    program: ClassVar[str] = "peft-esft compare"
    top_ps: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4])
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    lora_rank: int = 8
    lora_learning_rate: float = 1e-4
    full_learning_rate: float = 3e-5
    general: list[str] = field(default_factory=list)
    max_rows: int = 1000


Options = TypeVar("Options", bound=TrainOptions)


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse(kind: type[Options], arguments: Sequence[str]) -> tuple[Options, SFTConfig]:
    """Parses the arguments of a command that trains.

    Returns:
        The command's own options and TRL's. A budget that is a share is a number. `assistant_only_loss` is None if
        nobody set it.

    Raises:
        ValueError: if the recipe has keys that nothing takes, the budget is neither a share nor a memory, or TRL
            refuses a value.
        SystemExit: for wrong usage, with code 2.
    """
    parser = _Parser((kind, SFTConfig), prog=kind.program, add_help=False, allow_abbrev=False)
    parser.add_argument("--out", dest="output_dir", default=argparse.SUPPRESS)
    parser.set_defaults(**defaults())
    own, settings, of_recipe, rest = parser.parse_args_and_config(
        _with_recipe_apart(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [option for action in parser._actions for option in action.option_strings]
    if unknown := [text.partition("=")[0] for text in rest if text.startswith("--")]:
        parser.error(f"unrecognized arguments: {', '.join(unknown)}{_similar(unknown, known)}")
    if unknown := of_recipe[::2]:
        raise ValueError(f"the recipe has unknown keys: {', '.join(unknown)}{_similar(unknown, known)}")
    _take_positionals(own, rest, parser)
    if own.dtype not in (None, *DTYPES):
        parser.error(f"argument --dtype: invalid choice: {own.dtype!r} (choose from {', '.join(DTYPES)})")
    own.budget = read_budget(own.budget)
    if isinstance(own.budget, str):
        bytes_of("--budget", own.budget)
    if settings.output_dir in (None, "trainer_output"):
        parser.error("the following arguments are required: --out (in a recipe: output_dir)")
    return own, settings


def defaults() -> dict[str, Any]:
    """The values of `SFTConfig` that differ from TRL's."""
    return {
        "learning_rate": PAPER_LEARNING_RATE,
        "router_aux_loss_coef": 0.0,  # TRL adds the balancing loss to every mixture of experts otherwise
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "use_cpu": not torch.accelerator.is_available(),  # else accelerate sees one process, not all that run
        "assistant_only_loss": None,  # decided by the data and the chat template
        "disable_tqdm": not sys.stderr.isatty(),
        "save_total_limit": 2,
        "report_to": "none",
    }


def _with_recipe_apart(arguments: Sequence[str]) -> list[str]:
    """TRL's parser knows `--config FILE` alone, and argparse's users write `--config=FILE` too."""
    return [
        part
        for argument in arguments
        for part in (argument.split("=", 1) if argument.startswith("--config=") else [argument])
    ]


def _take_positionals(own: TrainOptions, rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """MODEL and DATA are what no option takes; DATA alone where a recipe names the model."""
    if len(rest) > 2:
        parser.error(f"unrecognized arguments: {' '.join(rest[2:])}; give MODEL DATA, then the options")
    names = ["model_name_or_path", "dataset_name"]
    if len(rest) == 1 and own.model_name_or_path and not own.dataset_name:
        names.reverse()
    for name, value in zip(names, rest, strict=False):
        setattr(own, name, value)
    if missing := [
        shown for shown, value in (("MODEL", own.model_name_or_path), ("DATA", own.dataset_name)) if not value
    ]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _similar(unknown: Sequence[str], known: Sequence[str]) -> str:
    near = [match for name in unknown for match in get_close_matches(name, known, 1)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
