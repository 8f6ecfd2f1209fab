"""Sees to it that `peft-esft train --resume` goes on with the run that was started, and not with another one."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from trl import SFTConfig

from .train_options import TrainOptions


RUN_OPTIONS = "train_options.json"
_FREE = ("resume", "dry_run", "attn_implementation")
_OF_TRL = ("seed", "learning_rate", "weight_decay", "max_length", "packing")
"""Those that a checkpoint overrides without a word, or that decide which rows and tokens were trained on."""


def note_options(own: TrainOptions, settings: SFTConfig) -> None:
    """Writes the options of a run into its folder, for `check_same_options`."""
    out = Path(settings.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN_OPTIONS).write_text(json.dumps(_options(own, settings), indent=1) + "\n", encoding="utf-8")


def check_same_options(own: TrainOptions, settings: SFTConfig) -> None:
    """Compares the options of `--resume` with those that the run was started with.

    Raises:
        ValueError: naming the options that differ. The learning rate is always the checkpoint's, another seed
            holds out rows that were trained on, and experts in other bits are another base.
    """
    try:
        earlier = json.loads((Path(settings.output_dir) / RUN_OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # nothing was started here, or by a program of one's own
    now = _options(own, settings)
    different = [
        f"{_shown(name)} was {earlier[name]} and is {now[name]}"
        for name in now
        if isinstance(earlier, dict) and name in earlier and earlier[name] != now[name]
    ]
    if different:
        raise ValueError(
            f"--resume goes on with the run in {settings.output_dir}, whose options were others: "
            f"{'; '.join(different)}. Give the same ones, or start a new run with another --out"
        )


def _options(own: TrainOptions, settings: SFTConfig) -> dict[str, Any]:
    values = {field.name: asdict(own)[field.name] for field in fields(TrainOptions) if field.name not in _FREE}
    values |= {name: getattr(settings, name) for name in _OF_TRL}
    return {name: _resolved(value) for name, value in values.items()}


def _resolved(value: Any) -> Any:
    """A path in one spelling; other values as they are."""
    is_path = isinstance(value, str) and value != "" and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value


def _shown(name: str) -> str:
    names = {"model_name_or_path": "MODEL", "dataset_name": "DATA"}
    return names.get(name, f"--{name.replace('_', '-')}")
