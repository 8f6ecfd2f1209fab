"""Chooses the tests that a mutant has to pass, see mutation.md: those of its file, the most direct ones first.

A pytest plugin for `make mutation`; without a mutant it runs all that are chosen here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


_ARITHMETIC = ["functional", "numerics", "oracle"]
_LAYERS = [
    *(
        "layer",
        "holds",
        "hazards",
        "plugin",
        "adapters",
        "undo",
        "mixed_batches",
        "hotswap",
        "compact",
        "combination",
        "kinds",
    ),
    *("kinds", "offload", "sequences", "caller_modes", "oracle"),
]
TESTS = {  # by file of the package
    "selection": ["selection"],
    "split_forward": _ARITHMETIC,
    "grouped_linear": _ARITHMETIC,
    "deltas": [*_ARITHMETIC, "combination", "layer"],
    "layer": _LAYERS,
    "effective_rows": _LAYERS,
    "held": _LAYERS,
    "merging": _LAYERS,
}
_LIKE_OLMOE = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v2")
_OTHER_PROCESSES = ("fresh_process", "trainer")
_OTHER_CALLERS = ("point_at_the_call",)
_OF_OTHER_FILES = (
    "every_sample_equals", "leaves_the_output_unchanged", "generation", "all_other_modules",
    "weight_decay", "every_loader", "routers_that_return", "tied_embeddings", "modules_to_save", "named_like",
)  # fmt: skip
_LEFT_OUT = (*_LIKE_OLMOE, *_OTHER_PROCESSES, *_OTHER_CALLERS, *_OF_OTHER_FILES)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.name.startswith("test_") and collection_path.stem not in _files() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    files = _files()
    chosen = [item for item in items if item.path.stem in files and not any(part in item.name for part in _LEFT_OUT)]
    chosen.sort(key=lambda item: files.index(item.path.stem))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _files() -> list[str]:
    """The names of the test files for the mutant under test, or all."""
    module = os.environ.get("MUTANT_UNDER_TEST", "").partition(".x")[0].rpartition(".")[2]
    names = TESTS.get(module, [name for own in TESTS.values() for name in own])
    return [f"test_{name}" for name in names]
