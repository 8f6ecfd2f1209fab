"""The tables of the README and of the page on performance are those of the committed results."""

from __future__ import annotations

import sys

import pytest

from repository import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))

import reporting
import summary


@pytest.mark.parametrize("name", summary.PAGES)
def test_the_page_shows_the_committed_results(name):
    page = (ROOT / name).read_text()
    assert "performance" in {found[2] for found in reporting.BLOCK.finditer(page)}
    assert reporting.fill_tables(page, {"performance": summary.table()}) == page


def test_a_missing_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        reporting.fill_tables("<!-- table nonsense -->\n<!-- end -->", {"performance": ""})


def test_the_picture_is_of_the_committed_results():
    header, rows = summary.picture().header, summary.picture().rows
    by_way = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
    (memory,) = summary.rows_of("memory", way="full", dtype="float32", checkpointing=False)
    assert by_way["full", "float32"]["memory_over_base"] == memory["over the base"]
    assert by_way["ESFT", "bfloat16"]["time_over_esft"] == 1
    assert (ROOT / "docs" / "figures" / "performance.svg").exists()
