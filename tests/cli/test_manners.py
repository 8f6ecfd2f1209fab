"""How the command line behaves: fast help, hints, one-line errors, pipes and interrupts without a traceback."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from typing import get_args

import pytest
from peft import LoraConfig, get_peft_model

from peft_esft import ESFTConfig, __version__
from peft_esft.cli import convert, score, select
from peft_esft.cli.main import build_parser, main
from peft_esft.ops.encodings import FORMS
from peft_esft.scoring.scores import Averaging, Metric

from families import tiny_model
from repository import ROOT


MODEL = str(ROOT / "examples" / "tiny_moe" / "model")


@contextmanager
def started(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peft_esft", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that run in the background of a shell ignore the signal, and what they start would too.
    ignored = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=env, **pipes) as process:
        signal.signal(signal.SIGINT, ignored)
        yield process


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An ESFT adapter, a LoRA adapter, and files of other kinds."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, config in (
        ("law", ESFTConfig(target_experts={0: [1]}, init_weights=False)),
        ("lora", LoraConfig(target_modules=["q_proj"])),
    ):
        base = tiny_model("olmoe")
        base.name_or_path = MODEL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT looks for the base's config
            get_peft_model(base, config).save_pretrained(folder / name)
    (folder / "empty").mkdir()
    (folder / "some.json").write_text("[1]")
    return folder


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"peft-esft {__version__}\n"


def test_help_loads_nothing_heavy():
    """Of any command: the parsers are built for all of them."""
    code = (
        "import sys\nfrom peft_esft.cli.main import build_parser\nparser = build_parser()\nparser.format_help()\n"
        "print({'torch', 'peft', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_choices_of_options_are_those_of_the_library():
    assert get_args(Averaging) == score.AVERAGING
    assert get_args(Metric) == select.METRICS
    assert FORMS[1:] == convert.FORMS


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["scor", MODEL], "did you mean score?"),
        (["select", "x", "--top-q", "3"], "did you mean --top-p or --top-k?"),
        (["plan", MODEL, "--gpus", "1x24GB", "--shares=0.3"], "did you mean --share?"),
        (["inspect", MODEL, "more"], "unrecognized arguments: more\n"),
        (
            ["eval", MODEL, "--limit", "3", "a", "x.jsonl"],
            "arguments: a x.jsonl; give all names and paths",
        ),
    ],
)
def test_what_is_like_an_unknown_word_is_named(arguments, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect {}/lav", "there is no folder '{}/lav'; did you mean {}/law?"),
        ("inspect {}/lora", "{}/lora is a PEFT adapter of type LORA, not a model or an ESFT adapter"),
        ("score {}/law --data x --out y", f"{{}}/law is an ESFT adapter, not a model; give its base: {MODEL}"),
        ("score {}/empty --data x --out y", "{}/empty is a folder without config.json and adapter_config.json, not a"),
        (f"diff {MODEL} {{}}/law", f"{MODEL} is a model, not an ESFT adapter"),
        (f"chat {MODEL} x={{}}/lora", "{}/lora is a PEFT adapter of type LORA, not an ESFT adapter"),
        ("merge {}/law {}/law {}/out", "{}/law is an ESFT adapter, not a model; give its base: "),
        (f"report {MODEL}", f"{MODEL} is a model, not a file of scores or an ESFT adapter"),
        (f"import {{}}/law --base {MODEL} --out x", "{}/law is an ESFT adapter already"),
        ("select {}/some.json", "{}/some.json is a JSON file, not a file of scores; peft-esft score writes one"),
        ("select {}/scores.json", "there is no file '{}/scores.json'"),
    ],
)
def test_a_path_of_another_kind_is_named_in_one_line(command, message, folders, capsys):
    assert main(command.replace("{}", str(folders)).split()) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("peft-esft: ")
    assert message.replace("{}", str(folders)) in output.err


def test_warnings_have_no_place_in_the_code(capsys, monkeypatch):
    def run(options: argparse.Namespace):
        for _ in range(2):
            warnings.warn("something\n to know", UserWarning, stacklevel=1)
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        return {}, "done"

    monkeypatch.setattr(select, "run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        parser = build_parser()
        assert parser.parse_args(["select", "x"]).run is run
        monkeypatch.setattr(sys.modules["peft_esft.cli.main"], "check_kinds", lambda options: None)
        assert main(["select", "x"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("done\n", "peft-esft: warning: something to know\n")


def test_a_reader_that_has_gone_ends_the_command_with_141():
    with started("inspect", MODEL) as process:
        process.stdout.close()  # like `| true`
        errors = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_an_interrupt_ends_the_command_with_130(tmp_path):
    rows, out, descriptor = tmp_path / "rows.txt", tmp_path / "s.json", None
    os.mkfifo(rows)  # the command waits for what nobody writes to it
    with started("score", MODEL, "--data", str(rows), "--out", str(out)) as process:
        while descriptor is None and process.poll() is None:
            try:
                descriptor = os.open(rows, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # the command has not opened it yet
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    os.close(descriptor)
    assert process.returncode == 130
    assert "Traceback" not in errors and not out.exists()


def test_every_command_has_a_help_line():
    listed = build_parser().format_help()
    for name in ("score", "select", "run", "merge"):
        assert re.search(rf"^ +{name} +\w+", listed, flags=re.MULTILINE)
