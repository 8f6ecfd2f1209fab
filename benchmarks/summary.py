"""The table and the picture of the README, from the results of the other benchmarks.

    python benchmarks/summary.py

Writes `results/summary.md`, docs/figures/performance.svg, and the table between `<!-- table performance -->` and
`<!-- end -->` in README.md, docs/performance.md and docs/deciding.md.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from peft_esft.analysis.drawing import MARKERS, PRINT, Plot, Style, render

from reporting import RESULTS, fill_tables


ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/performance.md", "docs/deciding.md")
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
WAYS = {
    "ESFT": "**ESFT**",
    "full": "full fine-tuning",
    "full, eager": "full fine-tuning, eager experts",
    "mask": "full gradients, masked to the chosen rows",
    "LoRA r 16": "PEFT LoRA r 16 on all experts",
    "modules": "the chosen experts as modules, in place",
}


def rows_of(name: str, **fields: Any) -> list[dict[str, Any]]:
    """The rows of a benchmark's results with these fields."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def fastest(cell: str) -> float:
    """The ratio of minima of a cell `ratio (median)`."""
    return float(cell.split()[0])


def times() -> dict[str, dict[str, float]]:
    """A whole model's training step over ESFT's, by way and dtype."""
    rows = {row["dtype"]: row for row in rows_of("model_step", checkpointing=False)}
    return {way: {dtype: 1.0 if way == "ESFT" else fastest(rows[dtype][way]) for dtype in DTYPES} for way in WAYS}


def memory() -> dict[str, dict[str, float]]:
    """What training holds at most, over the frozen base with its activations, by way and dtype."""
    rows = rows_of("memory", checkpointing=False)
    return {way: {row["dtype"]: row["over the base"] for row in rows if row["way"] == way} for way in WAYS}


def inference(case: str, dtype: str, column: str) -> float:
    """Time of inference over the base's."""
    (row,) = rows_of("inference", case=case, dtype=dtype)
    return fastest(row[column])


def table() -> str:
    """Each way to train in one line."""
    step, held = times(), memory()
    lines = [
        "| | training step, over ESFT's | memory, over the frozen base | prefill, over the base | decode |",
        "|---|---|---|---|---|",
    ]
    adapted = {"ESFT": "unmerged", "LoRA r 16": "LoRA r 16"}
    for way, name in WAYS.items():
        served = ["", ""]
        if way in adapted:
            served = [
                _of_dtypes({dtype: inference(case, dtype, adapted[way]) for dtype in DTYPES})
                for case in ("prefill 1 x 1,024", "decode 1 x 1")
            ]
        lines.append("| " + " | ".join([name, _of_dtypes(step[way]), _of_dtypes(held[way]), *served]) + " |")
    return "\n".join(lines)


def _of_dtypes(values: dict[str, float]) -> str:
    return " / ".join(f"{values[dtype]:.2f}" if values[dtype] < 10 else f"{values[dtype]:.0f}" for dtype in DTYPES)


def picture() -> Plot:
    """Time against memory of training."""
    step, held = times(), memory()
    points = [(way, dtype, step[way][dtype], held[way][dtype]) for way in WAYS for dtype in DTYPES]
    return Plot(
        name="performance",
        title="What a training step takes and holds: less of both is better",
        caption="Whole model of 109 M parameters, 8 of 64 experts in each layer trained, AdamW included, on a CPU.",
        header=("way", "dtype", "time_over_esft", "memory_over_base"),
        rows=points,
        draw=partial(_draw, points=points),
        height=4.2,
    )


def _draw(axes: Any, style: Style, points: list[tuple[str, str, float, float]]) -> None:
    for way, colour, marker in zip(WAYS, style.series, MARKERS, strict=True):
        for dtype, filled in zip(DTYPES, (True, False), strict=True):
            ((x, y),) = [(x, y) for own, of, x, y in points if (own, of) == (way, dtype)]
            axes.plot(
                [x], [y], marker=marker, color=colour, markersize=9, linestyle="none",
                markerfacecolor=colour if filled else "none", label=WAYS[way].strip("*") if filled else None,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    axes.minorticks_off()
    axes.set(xlabel="time of a step, over ESFT's (filled: fp32, hollow: bf16)", ylabel="memory, over the frozen base")
    axes.set_ylim(1, None)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def main() -> None:
    tables = {"performance": table()}
    (RESULTS / "summary.md").write_text(f"# Ways to train\n\n{tables['performance']}\n")
    for page in (ROOT / name for name in PAGES):
        page.write_text(fill_tables(page.read_text(), tables))
    (ROOT / "docs" / "figures" / "performance.svg").write_bytes(render(picture(), PRINT)["svg"])
    print(tables["performance"])


if __name__ == "__main__":
    main()
