"""Defines `peft-esft inspect`, which shows the experts of a model or the content of an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .kinds import ADAPTER_CONFIG
from .select import bars


SHOWN = 16  # ids in a line


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("inspect", help="show the experts of a model, or what an adapter holds")
    parser.set_defaults(run=run, kinds={"path": ("model", "adapter")})
    parser.add_argument("path", help="folder or Hub name of a model, or folder of an adapter")


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Describes a model or an adapter."""
    from ..interchange.base import empty_model
    from ..moe.containers import find_experts

    folder = Path(options.path)
    if (folder / ADAPTER_CONFIG).exists():
        return _inspect_adapter(folder)
    containers = find_experts(empty_model(options.path))
    if not containers:
        raise ValueError(f"{options.path} has no experts module of a known kind")
    record = {
        path: {"kind": c.kind, "num_experts": c.num_experts, "weights": c.weight_shapes}
        for path, c in containers.items()
    }
    lines = [
        f"{path}: {c.num_experts} experts of {c.parameters_per_expert:,} parameters ({c.kind})"
        for path, c in containers.items()
    ]
    return record, "\n".join(lines)


def _inspect_adapter(folder: Path) -> tuple[Any, str]:
    from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

    from ..interchange.adapter import AdapterFolder, read_config
    from ..tuner.model_card import describe_choice, describe_storage, num_experts_of, revision_of

    weights = folder / SAFETENSORS_WEIGHTS_NAME
    config = read_config(folder)
    fields, selection = config.to_dict(), config.adapted_experts
    entries = AdapterFolder(folder).files.entries if weights.exists() else {}
    beside = ("train_shared_experts", "train_non_expert_modules", "modules_to_save")
    record = {
        "base": config.base_model_name_or_path,
        "revision": revision_of(fields),
        "task": (config.selection or {}).get("task"),
        **{name: getattr(config, name) for name in ("task_type", "storage", "rank", *beside, "selection")},
        "target_experts": selection,
        "tensors": {key: list(entry.shape) for key, entry in entries.items()},
        "bytes": sum(entry.num_bytes for entry in entries.values()),
    }
    revision = f", revision {record['revision']}" if record["revision"] else ""
    lines = [
        f"ESFT adapter for {config.base_model_name_or_path or 'an unnamed base'}{revision}",
        f"experts chosen by: {describe_choice(fields) or 'not recorded'}",
    ]
    if record["task"]:
        lines.append(f"task: {record['task']}")
    also = [f"{name}={record[name]}" for name in beside if record[name]]
    if also:
        lines.append(f"besides the experts: {', '.join(also)}")
    known = num_experts_of(fields)
    most = max((max(ids) + 1 for ids in selection.values()), default=1)
    chart = bars({path: (len(ids), known.get(path, most)) for path, ids in selection.items()})
    for line, (path, ids) in zip(chart.splitlines(), selection.items(), strict=True):
        total = f" of {known[path]}" if path in known else ""
        lines.append(f"{line}{total}: {', '.join(map(str, ids[:SHOWN]))}{', ...' * (len(ids) > SHOWN)}")
    if entries:
        size = weights.stat().st_size / 1e6
        lines.append(f"{describe_storage(fields)}: {len(entries)} tensors, {size:.2f} MB")
    return record, "\n".join(lines)
