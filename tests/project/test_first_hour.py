"""The page of the first hour: its commands run as they stand, and what they print is what it shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from repository import ROOT


PAGE = ROOT / "docs" / "first_hour.md"
NUMBER = r"\d+\.\d+"


def steps():
    """Each command of the page with what it prints; the first one installs and shows nothing."""
    blocks = re.findall(r"```(sh|text)\n(.*?)\n```", PAGE.read_text(), flags=re.DOTALL)
    commands = [text for language, text in blocks if language == "sh"]
    shown = [text for language, text in blocks if language == "text"]
    return list(zip(commands, [None, *shown], strict=True))


def test_there_are_five_commands_and_the_first_one_installs():
    commands = [command for command, _ in steps()]
    assert len(commands) == 5 and not any("\n" in command for command in commands)
    assert commands[0] == "pip install '.[train]'"


def test_the_data_has_forty_conversations_that_do_not_ask_what_the_page_asks():
    lines = (ROOT / "examples" / "first_hour" / "help_desk.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    assert len(rows) == 40
    assert all([turn["role"] for turn in row] == ["user", "assistant"] for row in rows)
    assert lines[0] in PAGE.read_text()
    asked = {row[0]["content"] for row in rows}
    assert len(asked) == 40 and not asked & {"Do you sell maps?", "My book is broken."}


@pytest.mark.slow
def test_the_commands_print_what_the_page_shows(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = tmp_path / "bin" / "peft-esft"  # of this checkout, whatever is installed
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m peft_esft "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    for command, shown in steps()[1:]:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        plain = "chat examples/tiny_moe/model --" in command
        if plain:  # what an untrained model says hangs on the last bits of a sum
            assert "customer" not in done.stdout + shown
        else:
            same_but_for_last_digits(done.stdout.strip(), shown)


def same_but_for_last_digits(found, shown):
    assert re.sub(NUMBER, "N", found) == re.sub(NUMBER, "N", shown)
    numbers = [list(map(float, re.findall(NUMBER, text))) for text in (found, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1)


PUBLISHED = r"(bitsandbytes|datasets|deepspeed|lm-eval|matplotlib|torchao)\b"


def test_install_lines_name_a_path_until_the_package_is_published():
    """A name that is not ours yet could be somebody else's package."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "integrations").rglob("*.md")]
    files += [*(ROOT / "examples").rglob("*"), *(ROOT / "peft_esft").rglob("*.py")]
    targets = [
        target
        for file in files
        if file.suffix in (".md", ".py", ".yaml", ".ipynb")
        for target in re.findall(r"pip install (?:--?\w+ )*['\"]?([^\s'\"`]+)", file.read_text())
    ]
    assert "peft-esft" not in targets and len(targets) > 8
    # In braces: the versions that the package asks for when others are installed.
    wrong = [target for target in targets if not target.startswith((".", "{")) and not re.match(PUBLISHED, target)]
    assert not wrong, wrong
