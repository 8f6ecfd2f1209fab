"""The page on models has a row with a product's name for every architecture that was tested."""

from __future__ import annotations

import re
import sys

from repository import ROOT


sys.path.insert(0, str(ROOT / "tools"))

import write_models_page
import zoo


def test_every_architecture_has_a_row_and_a_product():
    page = (ROOT / "docs" / "models.md").read_text()
    _, table = page.split("| models | `model_type` |")
    rows = dict(re.findall(r"^\| ([^|]+) \| `(\w+)` \|", table, flags=re.MULTILINE))
    types = {*zoo.model_types(), *zoo.VARIANTS}
    assert set(rows.values()) == types
    assert {model_type: product for product, model_type in rows.items()} == write_models_page.PRODUCTS
    assert "Qwen3-30B-A3B" in page and "Mixtral-8x7B" in page


def test_the_head_is_that_of_the_tool():
    page = (ROOT / "docs" / "models.md").read_text()
    before, after = write_models_page.HEAD.split("{version}")
    assert page.startswith(before) and after in page
