"""What the benchmarks share: versions, and results as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"


def versions() -> dict[str, str]:
    """The versions that the figures depend on, and the machine's size."""
    packages = {name: version(name) for name in ("peft", "transformers", "accelerate")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
    }


def write_results(name: str, title: str, setting: str, rows: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """Writes `results/NAME.json` and `results/NAME.md`, and prints the latter."""
    RESULTS.mkdir(exist_ok=True)
    record = {"title": title, "setting": setting, "versions": versions, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    columns = list(rows[0])
    lines = [f"# {title}", "", setting, "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    lines += ["", ", ".join(f"{key} {value}" for key, value in versions.items())]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
