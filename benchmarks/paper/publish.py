"""Writes the tables and figures from the records: to each comparison's tables.md, docs/protocol.md and docs/figures.

python benchmarks/paper/publish.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "examples" / "tiny_moe")]

from comparisons import COMPARISONS, Comparison  # noqa: E402
from curves import all_plots  # noqa: E402
from reporting import fill_tables  # noqa: E402
from results import Results  # noqa: E402
from store import Store  # noqa: E402
from tables import all_tables  # noqa: E402


def load(comparison: Comparison) -> Results:
    """The records of a comparison."""
    return Results(Store(comparison.folder / "runs.jsonl"), comparison.protocol.steps)


def tables(comparison: Comparison) -> dict[str, str]:
    """Its tables by name."""
    timing = comparison.folder / "timing.json"
    found = all_tables(load(comparison), json.loads(timing.read_text()) if timing.exists() else {})
    return {f"{comparison.prefix}{name}": table for name, table in found.items()}


def publish(comparisons: Iterable[Comparison], page: Path, figures: Path) -> None:
    from peft_esft.analysis.drawing import PRINT, render

    everything: dict[str, str] = {}
    for comparison in comparisons:
        found = tables(comparison)
        everything.update(found)
        text = "\n\n".join(f"## {name}\n\n{table}" for name, table in found.items() if table)
        (comparison.folder / "tables.md").write_text(f"# Tables of the paper's comparison\n\n{text}\n")
        for plot in all_plots(load(comparison)):
            name = plot.name.replace("findings_", f"findings_{comparison.prefix}")
            (figures / f"{name}.svg").write_bytes(render(plot, PRINT)["svg"])
    page.write_text(fill_tables(page.read_text(), everything))


def main() -> None:
    publish(COMPARISONS.values(), ROOT / "docs" / "protocol.md", ROOT / "docs" / "figures")


if __name__ == "__main__":
    main()
