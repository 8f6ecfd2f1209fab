"""Writes the tables and figures from the records: to results/paper/tables.md, docs/findings.md and docs/figures.

python benchmarks/paper/publish.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "examples" / "tiny_moe")]

from curves import all_plots  # noqa: E402
from plan import Protocol  # noqa: E402
from reporting import RESULTS, fill_tables  # noqa: E402
from results import Results  # noqa: E402
from store import Store  # noqa: E402
from tables import all_tables  # noqa: E402


def load(folder: Path) -> tuple[Results, dict[str, dict[str, float]]]:
    """The records of the protocol's runs, and the ratios of training time."""
    timing = folder / "timing.json"
    return (
        Results(Store(folder / "runs.jsonl"), Protocol().steps),
        json.loads(timing.read_text()) if timing.exists() else {},
    )


def publish(folder: Path, page: Path, figures: Path) -> None:
    from peft_esft.analysis.drawing import PRINT, render

    results, timing = load(folder)
    tables = all_tables(results, timing)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items() if table)
    (folder / "tables.md").write_text(f"# Tables of the paper's comparison\n\n{text}\n")
    page.write_text(fill_tables(page.read_text(), tables))
    for plot in all_plots(results):
        (figures / f"{plot.name}.svg").write_bytes(render(plot, PRINT)["svg"])


def main() -> None:
    publish(RESULTS / "paper", ROOT / "docs" / "findings.md", ROOT / "docs" / "figures")


if __name__ == "__main__":
    main()
