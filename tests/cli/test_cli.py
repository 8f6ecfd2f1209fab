"""The command line, on the embedded model."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from peft import get_peft_model

from peft_esft import ESFTConfig, ExpertScores, select_experts
from peft_esft.cli.main import main
from peft_esft.scoring.memory_estimate import Setup
from peft_esft.scoring.preview import format_previews, preview_selections

import tasks
from families import tiny_model
from oracle import config_for
from repository import ROOT


MODEL = str(ROOT / "examples" / "tiny_moe" / "model")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A score file made by the command, from the general text."""
    folder = tmp_path_factory.mktemp("scores")
    data = ROOT / "examples" / "tiny_moe" / "tasks" / "general.jsonl"
    command = ["score", MODEL, "--data", str(data), "--out", str(folder / "s.json"), "--max-tokens", "2000"]
    assert main([*command, "--dtype", "float32", "--json"]) == 0
    return str(folder / "s.json")


def test_score_writes_exact_token_counts(scored, capsys):
    scores = ExpertScores.load(scored)
    assert scores.num_tokens == 2000
    assert len(scores.containers) == 4
    assert set(scores.parameters_per_expert().values()) == {3 * 64 * 192}


def test_score_takes_a_base_in_few_bits(scored, tmp_path):
    data = str(ROOT / "examples" / "tiny_moe" / "tasks" / "general.jsonl")
    out = str(tmp_path / "s.json")
    command = ["score", MODEL, "--data", data, "--out", out, "--max-tokens", "500", "--dtype", "float32", "--json"]
    counts = []
    for flags in ([], ["--bits", "8"]):
        assert main([*command, *flags]) == 0
        counts.append([container.selected_pairs for container in ExpertScores.load(out).containers.values()])
    # The first router sees no output of an expert.
    assert counts[0][0] == counts[1][0] and counts[0][1:] != counts[1][1:]


def test_select_prints_what_the_library_selects(scored, capsys, tmp_path):
    for flags, settings in (
        ([], {}),
        (["--top-p", "0.4"], {"top_p": 0.4}),
        (["--top-k", "5"], {"top_k": 5}),
        (["--budget", "0.1", "--max-experts", "9"], {"budget": 0.1, "max_experts": 9}),
        (["--metric", "gate", "--min-experts", "3"], {"metric": "gate", "min_experts": 3}),
    ):
        assert main(["select", scored, "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out) == select_experts(ExpertScores.load(scored), **settings)
    assert main(["select", scored, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("#") > 4 and "adapter_config.json" in text
    config = ESFTConfig.from_pretrained(str(tmp_path))
    assert config.target_experts == select_experts(ExpertScores.load(scored))
    assert config.selection["num_tokens"] == 2000
    assert (config.base_model_name_or_path, config.task_type) == (MODEL, "CAUSAL_LM")


def test_select_fills_memory(scored, capsys, tmp_path):
    scores = ExpertScores.load(scored)
    options = ["--tokens", "64", "--base", "nf4", "--optim", "adamw_8bit"]
    assert main(["select", scored, "--json", "--budget", "40MB", *options]) == 0
    memory = Setup(memory=40e6, tokens=64, base="nf4", optim="adamw_8bit")
    assert json.loads(capsys.readouterr().out) == select_experts(scores, budget=memory)
    command = ["select", scored, "--budget", "60MB", "--tokens", "64", "--rank", "4"]
    assert main([*command, "--out", str(tmp_path / "law")]) == 0
    config = ESFTConfig.from_pretrained(str(tmp_path / "law"))
    assert (config.rank, config.selection["budget"]) == (4, "0.06GB")
    assert config.target_experts == select_experts(scores, budget=Setup(memory=60e6, tokens=64, rank=4))
    capsys.readouterr()
    for flags, message in (
        (["--budget", "0.5", "--tokens", "64"], "--tokens is only for a budget of memory"),
        (["--budget", "1MB", "--tokens", "64"], "does not fit a budget of"),
        (["--budget", "lots"], "'lots' is not an amount of GPU memory"),
    ):
        assert main(["select", scored, *flags]) == 1
        assert message in capsys.readouterr().err


def test_answers_alone_are_scored(capsys, tmp_path):
    rows = [{"prompt": p, "completion": c} for p, c in tasks.load_task("verses", "train")[:6]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for more, out in ((["--answers-only"], "answers"), ([], "all")):
        command = ["score", MODEL, "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / f"{out}.json")]
        assert main([*command, *more]) == 0
    answers, everything = (ExpertScores.load(tmp_path / f"{name}.json") for name in ("answers", "all"))
    assert answers.answers_only and 12 <= answers.num_tokens < everything.num_tokens / 4
    (tmp_path / "text.jsonl").write_text('{"text": "x"}')
    command[3] = str(tmp_path / "text.jsonl")
    assert main([*command, "--answers-only"]) == 1
    assert "line 1 of" in capsys.readouterr().err


def test_preview_counts_what_would_be_trained(scored, capsys):
    scores = ExpertScores.load(scored)
    previews = preview_selections(scores, [0.2, 1.0])
    chosen = select_experts(scores, top_p=0.2)
    assert previews[0].num_parameters == sum(map(len, chosen.values())) * 3 * 64 * 192
    assert previews[0].megabytes["fp32"] == previews[0].num_parameters * 4 / 1e6
    assert previews[0].mean == sum(map(len, chosen.values())) / 4
    assert previews[1].share > previews[0].share > 0
    assert len(format_previews(previews).splitlines()) == 3
    assert main(["select", scored, "--preview"]) == 0
    assert capsys.readouterr().out.count("MB") == 10


def test_a_preview_takes_no_settings_that_it_would_not_heed(scored, capsys, tmp_path):
    for flags in (["--out", str(tmp_path / "x")], ["--min-experts", "3"], ["--max-experts", "3"]):
        assert main(["select", scored, "--preview", *flags]) == 1
        assert "leave out --" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_selection_is_not_written_over_a_trained_adapter(scored, capsys, tmp_path):
    base = tiny_model("olmoe")
    get_peft_model(base, config_for(base)).save_pretrained(tmp_path / "law")
    before = (tmp_path / "law" / "adapter_config.json").read_bytes()
    assert main(["select", scored, "--out", str(tmp_path / "law")]) == 1
    assert "holds a trained adapter (adapter_model.safetensors)" in capsys.readouterr().err
    assert (tmp_path / "law" / "adapter_config.json").read_bytes() == before
    assert main(["select", scored, "--out", str(tmp_path / "law" / "adapter_config.json")]) == 1
    assert "a file; it is the folder" in capsys.readouterr().err
    # An earlier selection, without weights, is replaced.
    for flags in ([], ["--top-k", "3"]):
        assert main(["select", scored, "--out", str(tmp_path / "selection"), *flags]) == 0


def test_where_scores_go_is_checked_before_the_model_is_loaded(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(f"{MODEL}/config.json", tmp_path / "model")  # and no weights
    (tmp_path / "data.txt").write_text("some text\n")
    for out in (tmp_path / "nowhere" / "s.json", tmp_path):
        assert main(["score", str(tmp_path / "model"), "--data", str(tmp_path / "data.txt"), "--out", str(out)]) == 1
        assert f"--out is {out}; it is a file for the scores, in a folder that exists" in capsys.readouterr().err


def test_inspect_a_model_and_an_adapter(scored, capsys, tmp_path):
    assert main(["inspect", MODEL]) == 0
    assert "model.layers.3.mlp.experts: 64 experts of 36,864 parameters (fused)" in capsys.readouterr().out
    main(["select", scored, "--out", str(tmp_path)])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["target_experts"] == select_experts(ExpertScores.load(scored))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select", "missing.json"], "missing.json"),
        (["score", MODEL, "--data", "missing.jsonl", "--out", "x"], "missing.jsonl"),
        (["inspect", "no/such/model"], "no/such/model"),
    ],
)
def test_refusals_exit_with_1_and_say_why(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.err.startswith("peft-esft: ") and message in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\nnonsense', "line 2 of"),
        ("a.jsonl", "[1]", "line 1 of"),
        ("a.jsonl", '{"prompt": "x"}', "line 1 of"),
        ("a.jsonl", '\n \n{"text": "x"}\n{bad\n', "line 4 of"),
        ("a.JSONL", '{"text": "x"}\n\n{"messages": ["hi"]}', "line 3 of"),
        ("a.jsonl", '{"messages": ["hi"]}', "message 1 is a str; expected a dict of role and content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}, {"from": "gpt"}]}',
            "message 2 has ['from']; expected",
        ),
        ("a.jsonl", '{"messages": []}', "its messages are an empty list"),
        (
            "a.json",
            '[\n {"text": "x"}\n]',
            "a.json is a .json file, whose lines are not samples: write an object",
        ),
        ("a.CSV", "text\nx", "is a .csv file"),
        ("a.jsonl.gz", "", "unpack it first"),
        ("a.txt", "\n\n", "is empty"),
        ("a.txt", b"\xff\xfea\x00", "a.txt is not UTF-8 text"),
    ],
)
def test_bad_data_files_are_refused_with_the_line(name, content, message, capsys, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["score", MODEL, "--data", str(tmp_path / name), "--out", str(tmp_path / "s.json")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_what_a_chat_template_refuses_is_said_with_the_line(capsys, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    refusal = "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}" + refusal + "{{ m.content }}{% endfor %}"
    )
    rows = [{"messages": [{"role": role, "content": "x"}]} for role in ("user", "system", "user")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    score = ["score", str(tmp_path / "model"), "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "s.json")]
    for more in ([], ["--batch-size", "1"]):
        assert main([*score, *more]) == 1
        error = capsys.readouterr().err
        assert "line 3 of" in error and "the chat template cannot format its messages: System role not" in error


def test_data_files_are_known_by_their_ending_in_any_case_and_may_have_a_mark(tmp_path):
    text = "In the beginning God created"
    line = json.dumps({"text": text})
    found = set()
    for name, content, encoding in (
        ("a.jsonl", line, "utf-8"),
        ("b.JSONL", line, "utf-8"),
        ("c.ndjson", f"\r\n{line}\r\n", "utf-8-sig"),
        ("d.txt", text, "utf-8-sig"),
        ("e", f"\n{text}\n", "utf-8"),
    ):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert main(["score", MODEL, "--data", str(tmp_path / name), "--out", str(tmp_path / "s.json")]) == 0
        scores = ExpertScores.load(tmp_path / "s.json")
        found.add((scores.num_samples, scores.num_tokens))
    assert len(found) == 1 and found.pop()[0] == 1


def test_wrong_usage_exits_with_2(capsys):
    score = ["score", MODEL, "--data", "x", "--out", "y"]
    for arguments in (
        [],
        ["nonsense"],
        ["select", "x", "--top-p", "0.1", "--top-k", "2"],
        [*score, "--dtype", "float99"],
        [*score, "--batch-size", "0"],
        [*score, "--max-length", "-1"],
        [*score, "--max-tokens", "many"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2


def test_no_layer_has_so_many_experts(scored, capsys):
    assert main(["select", scored, "--top-k", "65"]) == 1
    assert "--top-k is 65, and no layer has more than 64 experts" in capsys.readouterr().err
    assert main(["select", scored, "--top-k", "64"]) == 0


def test_scores_of_a_pipe_are_those_of_the_file(tmp_path, monkeypatch, capsys):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("In the beginning", "was the word"))
    (tmp_path / "rows.jsonl").write_text(rows)
    monkeypatch.setattr("sys.stdin", io.StringIO(rows))
    for data, name in (("-", "pipe.json"), (str(tmp_path / "rows.jsonl"), "file.json")):
        assert main(["score", MODEL, "--data", data, "--out", str(tmp_path / name)]) == 0
    found, expected = (ExpertScores.load(tmp_path / name).token() for name in ("pipe.json", "file.json"))
    assert all(found[path].equal(expected[path]) for path in expected)
    for text, message in (("", "the standard input is empty"), ("words\n", "line 1 of the standard input: it is not")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["score", MODEL, "--data", "-", "--out", str(tmp_path / "none.json")]) == 1
        assert message in capsys.readouterr().err
