"""Parses the arguments of `peft-esft train`: its own, and every field of TRL's `SFTConfig` by its name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

import torch
from trl import SFTConfig, TrlParser

from ..scoring.memory_size import bytes_of
from ..scoring.scores import Metric
from .score import DTYPES
from .select import read_budget


PAPER_LEARNING_RATE = 1e-5
WAYS = ("esft", "lora", "full")


@dataclass
class TrainOptions:
    """What `peft-esft train` takes beside `SFTConfig`; names that TRL's scripts have too mean the same there.

    `train.OWN` has their texts for `--help`, which loads neither TRL nor torch.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "MODEL"})
    model_revision: str | None = field(default=None, metadata={"help": "revision of a model on the Hub"})
    dtype: str | None = field(default=None, metadata={"help": "dtype to load the model in"})
    attn_implementation: str | None = field(default=None, metadata={"help": "attention implementation"})
    dataset_name: str | None = field(default=None, metadata={"help": "DATA"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset on the Hub"})
    dataset_train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval: str | None = field(default=None, metadata={"help": "held-out rows"})
    columns: list[str] = field(default_factory=list, metadata={"help": "what columns hold, KIND=COLUMN"})
    experts: str | None = field(default=None, metadata={"help": "file of scores"})
    metric: Metric = field(default="token", metadata={"help": "which score chooses"})
    top_p: float | None = field(default=None, metadata={"help": "share of the choices to cover in each layer"})
    budget: str | None = field(default=None, metadata={"help": "share of all experts, or memory of a GPU"})
    score_tokens: int = field(default=131_072, metadata={"help": "tokens to score"})
    rank: int | None = field(default=None, metadata={"help": "rank of the deltas"})
    bits: int | None = field(default=None, metadata={"help": "bits of the frozen base's experts"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint"})
    dry_run: bool = field(default=False, metadata={"help": "only say what would be done"})


@dataclass
class CompareOptions(TrainOptions):
    """What `peft-esft compare` takes beside `SFTConfig`."""

    top_ps: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4], metadata={"help": "ESFT is trained at each"})
    ways: list[str] = field(default_factory=lambda: list(WAYS), metadata={"help": "what is trained"})
    lora_rank: int = field(default=8, metadata={"help": "rank of LoRA"})
    lora_learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of LoRA"})
    full_learning_rate: float = field(default=3e-5, metadata={"help": "learning rate of full fine-tuning"})
    general: list[str] = field(default_factory=list, metadata={"help": "other text"})
    max_rows: int = field(default=1000, metadata={"help": "rows to measure on"})


Options = TypeVar("Options", bound=TrainOptions)


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: Sequence[str]) -> tuple[TrainOptions, SFTConfig]:
    """Parses the arguments after `peft-esft train`, see `parse_as`."""
    return parse_as(TrainOptions, arguments, "peft-esft train")


def parse_as(kind: type[Options], arguments: Sequence[str], program: str) -> tuple[Options, SFTConfig]:
    """Parses the arguments of a command that trains.

    Args:
        kind: the command's own options.
        arguments: what follows the command's name.
        program: the command's name, for messages.

    Returns:
        The command's own options and TRL's. A budget that is a share is a number. `assistant_only_loss` is None if
        nobody set it.

    Raises:
        ValueError: if the recipe has keys that nothing takes, the budget is neither a share nor a memory, or TRL
            refuses a value.
        SystemExit: for wrong usage, with code 2.
    """
    parser = _Parser((kind, SFTConfig), prog=program, add_help=False, allow_abbrev=False)
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
