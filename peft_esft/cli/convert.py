"""Defines the commands that turn adapters into other files and compare them: import, export, merge, compact, diff."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import interchange
from ..interchange.adapter import AdapterFolder, read_config
from ..interchange.base import Base, task_type_of
from ..interchange.compact import compact
from ..interchange.folders import new_folder
from ..interchange.repositories import local_folder
from ..ops.encodings import FORMS
from ..tuner.config import ESFTConfig
from ..tuner.targets import adapted_selection, resolve_target_experts


ADAPTER, BASE = "folder or Hub name of the adapter", "folder or Hub name of the base model"
SELECTION_ONLY = "the selection without the weights"


def add_parser(commands: Any) -> None:
    """Adds the five commands."""
    add = _adder(commands, "import", _import, "make an adapter of the original code's files")
    add("source", type=Path, help="folder of *.safetensors and expert_cfg.json")
    add("--base", type=Path, required=True, help=BASE)
    add("--expert-cfg", type=Path, help="the selection, if the folder has none")
    forms = ["auto", "delta", "rows"]
    add("--form", choices=forms, default="auto", help="how to store the weights (default: auto)")
    add("--selection-only", action="store_true", help=SELECTION_ONLY)
    add("--out", type=Path, required=True, help="new folder")
    add = _adder(commands, "export", _export, "write an adapter as the original code's files")
    add("adapter", type=Path, help=ADAPTER)
    add("--base", type=Path, required=True, help=BASE)
    add("--selection-only", action="store_true", help=SELECTION_ONLY)
    add("--out", type=Path, required=True, help="new folder")
    add = _adder(
        commands, "merge", _merge, "write base and adapter as an ordinary checkpoint, without loading the model"
    )
    add("base", type=Path, help=BASE)
    add("adapter", type=Path, help=ADAPTER)
    add("out", type=Path, help="folder for the checkpoint")
    add("--revision", help="of a base on the Hub")
    add("--variant", help="of the base's weights, for example fp16")
    add("--untie", action="store_true", help="write a head of its own if the base's is its embeddings")
    add = _adder(commands, "compact", _compact, "make a smaller file of an adapter, for inference")
    add("adapter", type=Path, help=ADAPTER)
    add("--form", choices=FORMS[1:], default="rows", help="(default: %(default)s)")
    add("--base", type=Path, help=f"{BASE}, for rows")
    add("--out", type=Path, required=True, help="new folder")
    add = _adder(commands, "diff", _diff, "compare two adapters")
    add("first", type=Path, help="folder of an adapter")
    add("second", type=Path, help="folder of another")


def _adder(commands: Any, name: str, run: Callable[[argparse.Namespace], tuple[Any, str]], text: str) -> Any:
    """Adds one command; returns the method that adds an argument to it."""
    parser = commands.add_parser(name, help=text)
    parser.set_defaults(run=run)
    return parser.add_argument


def _import(options: argparse.Namespace) -> tuple[Any, str]:
    if options.selection_only:
        base = Base(options.base)
        cfg = options.source if options.expert_cfg is None else options.expert_cfg
        config = ESFTConfig(
            target_experts=interchange.selection_from_expert_cfg(cfg, base.experts),
            base_model_name_or_path=str(options.base),
            task_type=task_type_of(base.model),
        )
        with new_folder(options.out) as folder:
            config.save_pretrained(str(folder))
    else:
        files = (options.source, options.base, options.out)
        interchange.import_official(*files, expert_cfg=options.expert_cfg, form=options.form)
        config = read_config(options.out)
    record = {"out": str(options.out), "target_experts": config.target_experts, "storage": config.storage}
    return record, f"{_count(config)} written to {options.out}"


def _export(options: argparse.Namespace) -> tuple[Any, str]:
    config = read_config(local_folder(options.adapter))
    if options.selection_only:
        experts = Base(options.base).experts
        cfg = interchange.expert_cfg_from_selection(
            adapted_selection(config.module_options, resolve_target_experts(config.target_experts or {}, experts)),
            experts,
            shared_experts=config.train_shared_experts,
            non_expert_modules=config.train_non_expert_modules,
        )
        with new_folder(options.out) as folder:
            (folder / "expert_cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")
    else:
        interchange.export_official(options.adapter, options.base, options.out)
    return {"out": str(options.out)}, f"{_count(config)} written to {options.out}"


def _merge(options: argparse.Namespace) -> tuple[Any, str]:
    place = {"revision": options.revision, "variant": options.variant}
    interchange.merge_checkpoint(options.base, options.adapter, options.out, **place, untie=options.untie)
    return {"out": str(options.out)}, f"merged checkpoint written to {options.out}"


def _compact(options: argparse.Namespace) -> tuple[Any, str]:
    compact(options.adapter, options.out, form=options.form, base=options.base)
    before, after = (AdapterFolder(folder).num_bytes for folder in (options.adapter, options.out))
    record = {"out": str(options.out), "form": options.form, "bytes": after, "bytes_before": before}
    return record, f"{before / 1e6:.2f} MB to {after / 1e6:.2f} MB, written to {options.out}"


def _diff(options: argparse.Namespace) -> tuple[Any, str]:
    record = interchange.diff_adapters(options.first, options.second)
    return record, interchange.format_diff(record)


def _count(config: ESFTConfig) -> str:
    chosen = config.adapted_experts
    return f"{sum(map(len, chosen.values()))} experts in {len(chosen)} layers"
