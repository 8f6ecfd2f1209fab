"""The tour runs, and the notebook that is shown on the web is the tour."""

from __future__ import annotations

import json
import sys

import matplotlib.pyplot as plt
import pytest

from repository import ROOT


sys.path.insert(0, str(ROOT / "tools"))

import build_notebook


def test_the_notebook_has_the_cells_of_the_script_and_their_output():
    cells = build_notebook.read_cells(build_notebook.SCRIPT)
    shown = json.loads(build_notebook.NOTEBOOK.read_text())["cells"]
    assert ["".join(cell["source"]) for cell in shown] == [cell.source for cell in cells]
    assert [cell["cell_type"] == "markdown" for cell in shown] == [cell.is_text for cell in cells]
    kinds = {output["output_type"] for cell in shown for output in cell.get("outputs", [])}
    assert kinds == {"stream", "display_data"}


def test_the_page_of_the_docs_is_the_notebook():
    """docs/tour.md, whose blocks `test_the_tour` runs as cells."""
    text, pictures = build_notebook.page(json.loads(build_notebook.NOTEBOOK.read_text()))
    assert build_notebook.PAGE.read_text() == text
    assert pictures
    for name, picture in pictures.items():
        assert (build_notebook.DOCS / name).read_bytes() == picture


@pytest.mark.slow
def test_the_tour(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace: dict = {}
    notebook = build_notebook.build(build_notebook.read_cells(build_notebook.SCRIPT), namespace)
    results = namespace["results"]
    for task in ("verses", "sections"):
        others = [found[task] for adapter, found in results.items() if adapter != task]
        assert results[task][task] > max(others) + 10
    assert namespace["merged_exact"] == namespace["unmerged"]
    printed = "".join(
        line for cell in notebook["cells"] for output in cell.get("outputs", []) for line in output.get("text", [])
    )
    assert "base untouched: True" in printed
    figures = [output for cell in notebook["cells"] for output in cell.get("outputs", []) if "data" in output]
    assert len(figures) == 1
    assert not plt.get_fignums()


def test_lines_above_the_first_cell_are_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("lost = 1\n# %%\nprint(lost)\n")
    with pytest.raises(ValueError, match=r"script\.py has lines above its first cell"):
        build_notebook.read_cells(script)
