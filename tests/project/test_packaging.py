"""Tests the installed package: a light import, clear errors below the oldest versions, one version."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import peft_esft
from peft_esft import versions

from repository import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _printed_by(code: str) -> set[str]:
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_loads_nothing_that_peft_has_not_loaded_but_the_core():
    """What is heavy here is other libraries, and the parts that not every program uses."""
    new = _printed_by(
        "import sys, peft; before = set(sys.modules); import peft_esft; print(*(set(sys.modules) - before))"
    )
    foreign = {name.partition(".")[0] for name in new} - {"peft_esft"} - set(sys.stdlib_module_names)
    assert not foreign
    parts = {".".join(name.split(".")[:2]) for name in new if name.startswith("peft_esft")}
    assert not parts & {
        "peft_esft.analysis",
        "peft_esft.interchange",
        "peft_esft.cli",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import peft_esft; from peft import PeftType",
        "import peft; import peft_esft; from peft import PeftType",
        "import peft_esft.tuner.config; from peft import PeftType",
        "import peft_esft.registration, importlib.util; importlib.util.find_spec('peft'); from peft import PeftType",
    ],
)
def test_the_tuner_is_registered_in_whatever_order_things_are_imported(code):
    lines = "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known; print(known[PeftType.ESFT].__name__)"
    assert _printed_by(f"{code}; {lines}") == {"ESFTModel"}


def test_the_import_alone_loads_neither_torch_nor_peft():
    assert _printed_by("import sys, peft_esft; print({'torch', 'peft'} & set(sys.modules))") == {"set()"}


def test_every_public_name_is_there():
    for name in peft_esft.__all__:
        assert getattr(peft_esft, name).__name__ == name
    assert set(peft_esft.__all__) == set(peft_esft._HOMES) <= set(dir(peft_esft))
    with pytest.raises(AttributeError, match="no attribute 'ESFTConfg'"):
        peft_esft.ESFTConfg  # noqa: B018


def test_install_lines_name_a_path_since_nobody_owns_the_package_s_name_on_the_index_yet():
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "peft_esft").rglob("*.py")]
    files += [*(ROOT / "examples").rglob("*.py"), *(ROOT / "examples").rglob("*.ipynb")]
    for file in files:
        found = re.findall(r"pip install (?!'?\.)[^`#\n]*peft[-_]esft", file.read_text(encoding="utf-8"))
        assert not found, file


def test_operators_are_registered_without_a_search_for_their_source():
    """`torch.library.custom_op` and `register_fake` look through every imported module, half of the import's time."""
    called = {
        node.attr
        for file in (ROOT / "peft_esft").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert "impl" in called
    assert not called & {"custom_op", "register_fake"}


def test_the_oldest_versions_are_those_of_the_requirements():
    lower = {}
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        (bound,) = [clause.version for clause in requirement.specifier if clause.operator == ">="] or [None]
        lower[requirement.name] = bound
    assert {name: lower[name] for name in versions.OLDEST} == versions.OLDEST


def test_the_constraints_of_the_oldest_test_run_are_the_oldest_versions():
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for name, bound in versions.OLDEST.items():
        assert Version(pinned[name]) == Version(bound), name


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"peft": "0.20.0"}, r"needs peft >= 0\.21 \(found 0\.20\.0\)\. .*'peft>=0\.21'$"),
        ({"torch": None}, r"torch >= 2\.10 \(found none\)"),
        ({"torch": "2.9.1+cpu", "transformers": "4.57.6"}, r"torch .*2\.9\.1\+cpu\), transformers .*found 4\.57\.6\)"),
    ],
)
def test_older_versions_are_refused_by_name(found, message, monkeypatch):
    have = {**versions.OLDEST, **found}
    monkeypatch.setattr(versions, "_installed", have.get)
    with pytest.raises(ImportError, match=message):
        versions.check_versions()


@pytest.mark.parametrize("version", ["99.0", "5.24.0.dev0", "5.20.0", "5.20.0a0+vendor"])
def test_newer_versions_and_the_oldest_pass(version, monkeypatch):
    monkeypatch.setattr(versions, "_installed", {**versions.OLDEST, "transformers": version}.get)
    versions.check_versions()


def test_an_old_library_stops_the_import_itself(tmp_path):
    (tmp_path / "peft-0.17.0.dist-info").mkdir()
    (tmp_path / "peft-0.17.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: peft\nVersion: 0.17.0\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import peft_esft"
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: peft_esft needs peft >= 0.21 (found 0.17.0)")


def test_the_version_is_written_once():
    assert "version" in PROJECT["dynamic"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+)", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == Version(peft_esft.__version__).base_version
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")
