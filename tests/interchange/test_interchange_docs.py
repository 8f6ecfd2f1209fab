"""The Python examples of the pages on converting and sharing run as they stand, in their order."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import get_peft_model

from peft_esft.cli.main import main
from peft_esft.interchange import export_official

from families import tiny_model
from oracle import config_for
from repository import ROOT


@pytest.mark.parametrize("page", ["converting.md", "sharing.md"])
def test_examples_run(page, tmp_path, monkeypatch):
    tiny_model("deepseek_v2", torch.bfloat16).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        tiny_model("deepseek_v2", torch.bfloat16),
        config_for(tiny_model("deepseek_v2"), init_weights=False),
    )
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("trained")
    export_official("trained", "base", "official")
    if page == "sharing.md":
        (tmp_path / "trained").rename("adapter")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    namespace: dict = {"model": model.unload()}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    expected = ("merged", "official_again") if page == "converting.md" else ("small", "smaller")
    assert all((tmp_path / name).is_dir() for name in expected)


def test_commands_run(tmp_path, monkeypatch):
    base = tiny_model("deepseek_v2", torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for name in ("other", "first"):
        model = get_peft_model(base, config_for(base, init_weights=False))
        model.save_pretrained(name)
        base = model.unload()
    export_official("first", "base", "given")
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "converting.md").read_text(), flags=re.DOTALL)
    for line in block.splitlines():
        program, *arguments = line.partition("#")[0].split()
        assert program == "peft-esft"
        if arguments[0] == "import":
            # The folder that the page starts from; `export` makes one of the same name again.
            arguments = [argument if argument != "official" else "given" for argument in arguments]
        assert main(arguments) == 0
    assert all((tmp_path / name).is_dir() for name in ("adapter", "official", "merged", "small"))


def test_the_figures_of_the_page_are_those_of_the_benchmark():
    text = (ROOT / "docs" / "sharing.md").read_text()
    rows = json.loads((ROOT / "benchmarks" / "results" / "compact.json").read_text())["rows"]
    tasks = ("sections", "verses", "signatures", "french")
    for form, limit in (("rows", 2.01), ("int8", 1.05), ("int4", 0.55), ("int1", 0.15)):
        own = {row["task"]: row for row in rows if row["form"] == form}
        line = next(line for line in text.splitlines() if line.startswith(f"| `{form}` |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        size = max(row["bytes per weight"] for row in own.values())
        assert size <= limit
        assert cells[1:6] == [
            f"{size:.2f}",
            *(f"{own[task]['exact (%)']:.1f}, {own[task]['loss']:.3f}" for task in tasks),
        ]
