"""Runs examples/tour.py; writes examples/tour.ipynb, its cells with what they print and draw, and docs/tour.md.

python tools/build_notebook.py

The script is the source. Cells begin at lines `# %%`; those that begin at `# %% [markdown]` are text.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "tour.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
DOCS = ROOT / "docs"
PAGE = DOCS / "tour.md"
MARKER = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """A cell of a percent script.

    Attributes:
        is_text: Markdown, not code.
        source: without the marker, and without the comment signs if it is text.
    """

    is_text: bool
    source: str


def read_cells(script: Path) -> list[Cell]:
    """The cells of a script, in their order."""
    head, *parts = MARKER.split(script.read_text(encoding="utf-8"))
    if head.strip():
        raise ValueError(f"{script.name} has lines above its first cell")
    return [
        Cell(kind is not None, (re.sub(r"^# ?", "", text, flags=re.MULTILINE) if kind else text).strip())
        for kind, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def run_cell(source: str, namespace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Runs one cell as a notebook does: what it prints, then the figures that it leaves open."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    for number in plt.get_fignums():
        drawn = io.BytesIO()
        plt.figure(number).savefig(drawn, format="png", dpi=90, metadata={"Software": None})
        image = base64.b64encode(drawn.getvalue()).decode()
        outputs.append({"output_type": "display_data", "data": {"image/png": image}, "metadata": {}})
    plt.close("all")
    return outputs


def build(cells: list[Cell], namespace: dict[str, Any]) -> dict[str, Any]:
    """Runs all cells in one namespace and gives the notebook, in the form of nbformat 4.5."""
    plt.switch_backend("agg")
    written: list[dict[str, Any]] = []
    for number, cell in enumerate(cells, 1):
        entry = {"id": f"cell-{number}", "metadata": {}, "source": _lines(cell.source)}
        if cell.is_text:
            written.append({"cell_type": "markdown", **entry})
            continue
        outputs = run_cell(cell.source, namespace, f"cell {number}")
        written.append({"cell_type": "code", "execution_count": None, **entry, "outputs": outputs})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The notebook as a page of the docs.

    Returns:
        The page, and its pictures by their paths below the docs' folder. The text above a picture describes it.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            described = " ".join(source.split())
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
                continue
            name = f"figures/tour_{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode(output["data"]["image/png"])
            parts.append(f"![{described}]({name})")
    return "\n\n".join(parts) + "\n", pictures


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "examples").symlink_to(ROOT / "examples")
        os.chdir(folder)  # what the cells write is not kept
        notebook = build(read_cells(SCRIPT), {})
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text, pictures = page(notebook)
    PAGE.write_text(text, encoding="utf-8")
    for name, picture in pictures.items():
        (DOCS / name).write_bytes(picture)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {len(notebook['cells'])} cells")


if __name__ == "__main__":
    main()
