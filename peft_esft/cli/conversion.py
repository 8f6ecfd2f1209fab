"""The commands of `peft-esft` that turn adapters into other files and compare them; thin over `interchange`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..interchange import (
    diff_adapters,
    expert_cfg_from_selection,
    export_official,
    format_diff,
    import_official,
    merge_checkpoint,
    selection_from_expert_cfg,
)
from ..interchange.adapter import AdapterFolder, read_config
from ..interchange.base import Base, task_type_of
from ..interchange.compact import compact
from ..interchange.folders import new_folder
from ..ops.encodings import FORMS
from ..tuner.config import ESFTConfig
from ..tuner.targets import adapted_selection, resolve_target_experts


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Adds the commands and returns their parsers."""
    parsers = {
        "import": (_import, "make an adapter of the original code's files"),
        "export": (_export, "write an adapter as the original code's files"),
        "merge": (_merge, "write base and adapter as an ordinary checkpoint, without loading the model"),
        "compact": (_compact, "make a smaller file of an adapter, for inference"),
        "diff": (_diff, "compare two adapters"),
    }
    added = {name: commands.add_parser(name, help=help_) for name, (_, help_) in parsers.items()}
    for name, (command, _) in parsers.items():
        added[name].set_defaults(command=command)
    added["import"].add_argument("source", type=Path, help="folder of *.safetensors and expert_cfg.json")
    added["import"].add_argument("--base", type=Path, required=True, help="folder of the base model")
    added["import"].add_argument("--expert-cfg", type=Path, help="the selection, if the folder has none")
    added["import"].add_argument(
        "--form", choices=["auto", "delta", "rows"], default="auto", help="how to store the weights (default: auto)"
    )
    added["export"].add_argument("adapter", type=Path, help="folder of the adapter")
    added["export"].add_argument("--base", type=Path, required=True, help="folder of the base model")
    for name in ("import", "export"):
        added[name].add_argument("--selection-only", action="store_true", help="the selection without the weights")
    added["merge"].add_argument("base", type=Path, help="folder of the base model")
    added["merge"].add_argument("adapter", type=Path, help="folder of the adapter")
    added["merge"].add_argument("out", type=Path, help="folder for the checkpoint")
    added["compact"].add_argument("adapter", type=Path, help="folder of the adapter")
    added["compact"].add_argument("--form", choices=FORMS[1:], default="rows", help="(default: %(default)s)")
    added["compact"].add_argument("--base", type=Path, help="folder of the base model, for rows")
    for name in ("import", "export", "compact"):
        added[name].add_argument("--out", type=Path, required=True, help="new folder")
    added["diff"].add_argument("first", type=Path, help="folder of an adapter")
    added["diff"].add_argument("second", type=Path, help="folder of another")
    return list(added.values())


def _import(options: argparse.Namespace) -> tuple[Any, str]:
    if options.selection_only:
        base = Base(options.base)
        cfg = options.source if options.expert_cfg is None else options.expert_cfg
        config = ESFTConfig(
            target_experts=selection_from_expert_cfg(cfg, base.experts),
            base_model_name_or_path=str(options.base),
            task_type=task_type_of(base.model),
        )
        with new_folder(options.out) as folder:
            config.save_pretrained(str(folder))
    else:
        import_official(options.source, options.base, options.out, expert_cfg=options.expert_cfg, form=options.form)
        config = read_config(options.out)
    record = {"out": str(options.out), "target_experts": config.target_experts, "storage": config.storage}
    return record, f"{_count(config)} written to {options.out}"


def _export(options: argparse.Namespace) -> tuple[Any, str]:
    if options.selection_only:
        config, experts = read_config(options.adapter), Base(options.base).experts
        cfg = expert_cfg_from_selection(
            adapted_selection(config.module_options, resolve_target_experts(config.target_experts or {}, experts)),
            experts,
            shared_experts=config.train_shared_experts,
            non_expert_modules=config.train_non_expert_modules,
        )
        with new_folder(options.out) as folder:
            (folder / "expert_cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")
    else:
        export_official(options.adapter, options.base, options.out)
    record = {"out": str(options.out)}
    return record, f"{_count(read_config(options.adapter))} written to {options.out}"


def _merge(options: argparse.Namespace) -> tuple[Any, str]:
    merge_checkpoint(options.base, options.adapter, options.out)
    return {"out": str(options.out)}, f"merged checkpoint written to {options.out}"


def _compact(options: argparse.Namespace) -> tuple[Any, str]:
    compact(options.adapter, options.out, form=options.form, base=options.base)
    before, after = (AdapterFolder(folder).num_bytes for folder in (options.adapter, options.out))
    record = {"out": str(options.out), "form": options.form, "bytes": after, "bytes_before": before}
    return record, f"{before / 1e6:.2f} MB to {after / 1e6:.2f} MB, written to {options.out}"


def _diff(options: argparse.Namespace) -> tuple[Any, str]:
    record = diff_adapters(options.first, options.second)
    return record, format_diff(record)


def _count(config: ESFTConfig) -> str:
    chosen = config.adapted_experts
    return f"{sum(map(len, chosen.values()))} experts in {len(chosen)} layers"
