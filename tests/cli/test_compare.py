"""`peft-esft compare` on the embedded model: what it trains, measures and writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_esft import ESFTConfig, quantize_experts
from peft_esft.checkpoints import last_complete_checkpoint
from peft_esft.cli import comparing
from peft_esft.cli.finetune import Finetuning
from peft_esft.cli.main import main

from repository import ROOT


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
GENERAL = str(ROOT / "examples" / "tiny_moe" / "tasks" / "general.jsonl")
VERSES = ROOT / "examples" / "tiny_moe" / "tasks" / "verses.jsonl"
QUICK = ["--max-steps", "2", "--per-device-train-batch-size", "4", "--max-length", "128", "--max-rows", "10"]
RATES = ["--learning-rate", "3e-3", "--lora-learning-rate", "3e-3", "--full-learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "law.jsonl"
    rows = [json.loads(line) for line in VERSES.read_text().splitlines()[:24]]
    file.write_text("".join(json.dumps({key: row[key] for key in ("prompt", "completion")}) + "\n" for row in rows))
    return str(file)


def compare(data, out, *options):
    return main(["compare", MODEL, data, "--out", str(out), *QUICK, *RATES, *options])


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "law"
    assert compare(data, out, "--top-ps", "0.1", "0.3", "--general", GENERAL) == 0
    return out


def results(out):
    return json.loads((out / "compare.json").read_text())["results"]


def test_each_way_costs_and_gives(compared):
    found = results(compared)
    assert list(found) == ["base", "esft-0.1", "esft-0.3", "lora", "full"]
    experts = {
        name: sum(map(len, ESFTConfig.from_pretrained(str(compared / name)).target_experts.values()))
        for name in ("esft-0.1", "esft-0.3")
    }
    assert experts["esft-0.1"] < experts["esft-0.3"]
    for name, count in experts.items():
        assert found[name]["trained_parameters"] == count * 3 * 64 * 192
        assert found[name]["saved_bytes"] == (compared / name / "adapter_model.safetensors").stat().st_size
    lora = PeftConfig.from_pretrained(compared / "lora")
    assert (lora.r, lora.lora_alpha) == (8, 16) and all("self_attn" in path for path in lora.target_modules)
    assert found["full"]["trained_parameters"] > 10_000_000 and not (compared / "full").exists()
    for name, rate in (("esft-0.1", 3e-3), ("lora", 3e-3), ("full", 1e-3)):
        assert found[name]["learning_rate"] == rate and found[name]["steps"] == 2
        assert found[name]["loss"] < found["base"]["loss"] and found[name]["seconds"] > 0
        assert found[name]["general"]["general"] != found["base"]["general"]["general"]
    page = (compared / "compare.html").read_text()
    assert all(name in page for name in found)


def test_losses_are_those_of_eval(compared, data, capsys):
    settings = ["--max-length", "128", "--general", GENERAL, "--max-rows", "10", "--dtype", "float32", "--json"]
    folders = [str(compared / name) for name in ("esft-0.3", "lora")]
    assert main(["eval", MODEL, *folders, data, *settings]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == results(compared)["base"]["num_samples"] == 2
    for name, key in (("base", "base"), ("esft-0_3", "esft-0.3"), ("lora", "lora")):
        own, expected = record["models"][name], results(compared)[key]
        assert own["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert own["exact_match"] == expected["exact_match"]
        assert own["general"]["general"]["loss"] == pytest.approx(expected["general"]["general"], rel=1e-4)


def test_a_second_start_trains_what_is_missing(compared, data, capsys, monkeypatch):
    before = (compared / "compare.json").read_text()
    record = json.loads(before)
    del record["results"]["lora"]
    (compared / "compare.json").write_text(json.dumps(record))
    trained, prepare = [], Finetuning.prepare.__func__

    def noted(cls, own, settings, wrap=None):
        trained.append(settings.output_dir.rpartition("/")[2])
        return prepare(cls, own, settings, wrap)

    monkeypatch.setattr(Finetuning, "prepare", classmethod(noted))
    assert compare(data, compared, "--top-ps", "0.1", "0.3", "--general", GENERAL) == 0
    assert trained == ["lora"]
    text = capsys.readouterr().out
    assert "loss on general" in text and text.index("esft-0.3") < text.index("lora")
    assert set(results(compared)) == set(json.loads(before)["results"])


def test_an_interruption_keeps_what_is_done(data, tmp_path, capsys, monkeypatch):
    fit = Finetuning.fit

    def interrupted(self):
        if self.scores is None:
            raise KeyboardInterrupt("stopped after step 1 of 2")
        return fit(self)

    options = ["--ways", "esft", "lora", "--top-ps", "0.1"]
    monkeypatch.setattr(Finetuning, "fit", interrupted)
    assert compare(data, tmp_path / "law", *options) == 130
    assert "stopped after step 1 of 2; go on with the same command" in capsys.readouterr().err
    assert set(results(tmp_path / "law")) == {"base", "esft-0.1"}
    monkeypatch.setattr(Finetuning, "fit", fit)
    assert compare(data, tmp_path / "law", *options, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["ways"]) == {"base", "esft-0.1", "lora"} and record["left_out"] == ""


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint(data, tmp_path, capsys):
    out = tmp_path / "law"
    options = ["--ways", "lora", "--max-steps", "40", "--save-steps", "2"]
    command = [sys.executable, "-m", "peft_esft", "compare", MODEL, data, "--out", str(out), *QUICK, *RATES, *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=env, **quiet) as process:
        while process.poll() is None and last_complete_checkpoint(out / "lora") is None:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL and set(results(out)) == {"base"}
    assert compare(data, out, *options) == 0
    assert results(out)["lora"]["resumed"]
    assert ">: training was interrupted; the time is that since its last start" in capsys.readouterr().out


def test_a_start_that_was_interrupted_before_the_first_result(data, tmp_path, capsys, monkeypatch):
    prepare, options = Finetuning.prepare, ["--ways", "lora"]

    def interrupted(own, settings, wrap=None):
        prepare(own, settings, wrap)  # makes the folder
        raise KeyboardInterrupt

    monkeypatch.setattr(Finetuning, "prepare", interrupted)
    assert compare(data, tmp_path / "law", *options) == 130
    assert results(tmp_path / "law") == {} and (tmp_path / "law" / "lora").is_dir()
    monkeypatch.setattr(Finetuning, "prepare", prepare)
    # With other options, too: nothing was trained that could be mixed.
    assert compare(data, tmp_path / "law", *options, "--lora-rank", "4") == 0
    assert set(results(tmp_path / "law")) == {"base", "lora"}


def test_full_alone_that_does_not_fit_is_an_error(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "_memory", lambda: 1e6)
    assert compare(data, tmp_path / "law", "--ways", "full") == 1
    assert "full fine-tuning, the only one of --ways, is left out: it takes about 0." in capsys.readouterr().err


def test_full_is_left_out_where_it_does_not_fit(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "_memory", lambda: 1e6)
    assert compare(data, tmp_path / "law", "--ways", "full", "lora") == 0
    text = capsys.readouterr().out
    assert "full fine-tuning is left out: it takes about 0." in text and "GB of 0.001" in text
    assert set(results(tmp_path / "law")) == {"base", "lora"}


def test_full_is_left_out_over_a_quantised_base(data, tmp_path, capsys):
    quantised = quantize_experts(AutoModelForCausalLM.from_pretrained(MODEL), bits=8)
    quantised.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "base")
    for number, base in enumerate(([MODEL, data, "--bits", "8"], [str(tmp_path / "base"), data])):
        out = tmp_path / str(number)
        assert main(["compare", *base, "--out", str(out), *QUICK, *RATES, "--ways", "lora", "full"]) == 0
        assert "full fine-tuning is left out: the base is quantised" in capsys.readouterr().out
        assert set(results(out)) == {"base", "lora"}


def test_other_options_than_before_are_refused(compared, data, capsys):
    assert compare(data, compared, "--top-ps", "0.1", "0.3", "--general", GENERAL, "--lora-rank", "4") == 1
    assert "holds results with lora_rank=8, and now lora_rank=4; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", "esft", "dora"], "--ways has 'dora'; it takes esft, lora, full"),
        (["--top-ps", "0.1", "1.5"], "--top-ps has 1.5; each is a share above 0 and at most 1"),
        (["--top-p", "0.1"], "compare takes --top-ps"),
        (["--budget", "24GB"], "compare takes --top-ps"),
        (["--resume"], "compare takes neither --dry-run nor --resume"),
        (["--lora-rank", "0"], "--lora-rank is 0; it is at least 1"),
        (["--general", "missing.jsonl"], "there is no file or folder 'missing.jsonl'"),
    ],
)
def test_bad_options(options, message, data, tmp_path, capsys):
    assert compare(data, tmp_path / "law", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "law").exists() or not any((tmp_path / "law").iterdir())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("notes.txt", "mine", "which holds something else; name a new folder"),
        ("compare.json", '{"options": {}', "is damaged"),
        ("compare.json", "[]", "is damaged"),
    ],
)
def test_a_folder_of_something_else(file, content, message, data, tmp_path, capsys):
    (tmp_path / file).write_text(content)
    assert compare(data, tmp_path) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / file).read_text() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_the_transcript_in_the_docs(tmp_path, capsys, monkeypatch):
    page = (ROOT / "docs" / "deciding.md").read_text().partition("## Compare on your own data")[2]
    command, shown = re.findall(r"```(?:sh|text)\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.replace("--out compared", f"--out {tmp_path / 'compared'}").replace("\\\n", ""))
    assert main(arguments[1:]) == 0
    tables = [{line.split()[0]: line for line in text.splitlines()[1:-2]} for text in (shown, capsys.readouterr().out)]
    expected, found = ({name: re.findall(r"[\d.,]+", line) for name, line in table.items()} for table in tables)
    assert expected.keys() == found.keys() == {"way", "base", "esft-0.1", "esft-0.2", "esft-0.4", "lora", "full"}
    for name in expected.keys() - {"way", "base"}:
        trained, *_ = expected[name][-8:]
        assert trained in found[name]  # times and losses differ between machines


def test_unknown_options_name_the_near_ones(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare(data, tmp_path / "law", "--lora-rnk", "4")
    error = capsys.readouterr().err
    assert "peft-esft compare: unrecognized arguments: --lora-rnk; did you mean --lora-rank?" in error
