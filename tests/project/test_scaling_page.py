"""The tables of docs/scaling.md are those of the estimates."""

from __future__ import annotations

import sys

from peft_esft.scoring.memory_estimate import Setup, most_experts

from repository import ROOT


sys.path.insert(0, str(ROOT / "tools"))

import write_scaling_page


def test_the_page_shows_the_estimates():
    page = write_scaling_page.PAGE.read_text()
    assert write_scaling_page.filled(page) == page
    assert page.count("| ESFT, 8-bit AdamW |") == len(write_scaling_page.ON_ONE)
    setup = Setup(memory=80e9, tokens=1024, base="nf4", rank=16, optim="adamw_torch_fused")
    most = most_experts(write_scaling_page.sizes_of("gpt-oss-120b"), setup)
    assert f"With 1,024 tokens, 80 GB hold gpt-oss-120b in NF4 and deltas of rank 16 on {most} experts" in page
