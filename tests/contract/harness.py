"""Takes PEFT's test classes and puts ESFT's configs in the place of those that they are written for."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from fetch_peft_tests import PACKAGE, tests_folder


class NotApplicable(Exception):
    """A test of PEFT's skipped itself."""


@dataclass(frozen=True)
class Declared:
    """Why a test of PEFT's does not apply to ESFT, and how it fails for that very reason."""

    reason: str
    raises: type[BaseException] = NotApplicable

    @property
    def mark(self) -> pytest.MarkDecorator:
        return pytest.mark.xfail(reason=self.reason, raises=self.raises, strict=True)


def peft_tests(module: str) -> ModuleType:
    """Imports a module of PEFT's tests.

    Raises:
        RuntimeError: if they have not been fetched.
    """
    folder = tests_folder()
    if not folder.is_dir():
        raise RuntimeError(f"PEFT's tests are not in {folder}: run tools/fetch_peft_tests.py, or `make contract`")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        pytest.register_assert_rewrite(PACKAGE)
    # Imported at the top of the modules, for tests of other methods than ours.
    stubs = {
        "datasets": types.SimpleNamespace(load_dataset=None),
        "diffusers": types.SimpleNamespace(StableDiffusionPipeline=type("StableDiffusionPipeline", (), {})),
    }
    missing = [name for name in stubs if importlib.util.find_spec(name) is None]
    sys.modules.update({name: stubs[name] for name in missing})
    try:
        return importlib.import_module(f"{PACKAGE}.{module}")
    finally:
        for name in missing:
            del sys.modules[name]


def transplant(
    test_class: type,
    tables: Mapping[str, Sequence[Any]],
    declared: Mapping[str, Declared],
    written_for: Mapping[str, Mapping[str, Any]] | None = None,
) -> type:
    """A subclass of one of PEFT's test classes that runs on our configs.

    Args:
        test_class: the class.
        tables: by the argument names of a `parametrize` mark, the rows that take the place of PEFT's. A test without
            any such mark is written for one named method, and is left out.
        declared: the tests that do not apply, or `test[row]` for one row of a table, by its first value.
        written_for: tests without parameters that hold for every method; by their names, what takes the place of the
            globals in which they name one.

    Returns:
        The subclass, whose `left_out` names the tests that are left out.
    """
    members: dict[str, Any] = {"left_out": set(), "__module__": __name__}
    for name, function in inspect.getmembers(test_class, inspect.isfunction):
        if not name.startswith("test"):
            continue
        originals = getattr(function, "pytestmark", [])
        marks = [_replaced(mark, tables, name, declared) for mark in originals]
        values = (written_for or {}).get(name)
        if not values and all(mark is original for mark, original in zip(marks, originals, strict=True)):
            members[name] = None  # hides the inherited test from pytest
            members["left_out"].add(name)
            continue
        copy = types.FunctionType(
            function.__code__,
            {**function.__globals__, **values} if values else function.__globals__,
            name,
            function.__defaults__,
            function.__closure__,
        )
        copy.pytestmark = marks + ([declared[name].mark.mark] if name in declared else [])
        members[name] = copy
    return type(test_class.__name__, (test_class,), members)


def _replaced(
    mark: pytest.Mark, tables: Mapping[str, Sequence[Any]], test: str, declared: Mapping[str, Declared]
) -> pytest.Mark:
    if mark.name != "parametrize":
        return mark
    names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
    rows = tables.get(", ".join(name.strip() for name in names))
    if rows is None:
        return mark
    marked = []
    for row in rows:
        exception = declared.get(f"{test}[{row[0]}]") if isinstance(row, tuple) else None
        marked.append(pytest.param(*row, marks=exception.mark) if exception else row)
    return pytest.mark.parametrize(mark.args[0], marked).mark
