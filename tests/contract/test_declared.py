"""Tests that docs/contract.md lists just the tests of PEFT that are declared as failing or left out."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import test_peft_common
import test_peft_configs
import test_peft_custom


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")
DECLARED = (
    test_peft_common.DECLARED.keys()
    | test_peft_common.DECLARED_FOR_TOYS.keys()
    | {name.partition("[")[0] for name in test_peft_custom.DECLARED}
    | test_peft_configs.DECLARED.keys()
)


def number_of_tests(module: object) -> int:
    classes = [member for member in vars(module).values() if hasattr(member, "left_out")]
    return sum(name.startswith("test") and value is not None for c in classes for name, value in inspect.getmembers(c))


def test_the_page_names_every_declared_test_and_no_other() -> None:
    named = set(re.findall(r"`(_?test_\w+)`", PAGE))
    named -= {"test_disable_adapters", "test_add_adapter_rejects_duplicate_name_without_mutation"}
    assert named - {"_test_lora_conversion"} == DECLARED


def test_the_page_counts_right() -> None:
    assert f"all {len(test_peft_common.methods())} tests" in PAGE
    assert f"{number_of_tests(test_peft_custom)} tests: those" in PAGE
    assert f"{number_of_tests(test_peft_configs)} tests |" in PAGE


def test_every_declared_test_is_run() -> None:
    classes = [c for m in (test_peft_custom, test_peft_configs) for c in vars(m).values() if hasattr(c, "left_out")]
    run = {name for c in classes for name, value in inspect.getmembers(c) if value is not None}
    assert run | set(test_peft_common.methods()) >= DECLARED
