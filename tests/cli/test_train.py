"""`peft-esft train` on the embedded model: what it reads, decides, writes, refuses, and how it goes on."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_esft import ESFTConfig, ExpertScores
from peft_esft.checkpoints import last_complete_checkpoint
from peft_esft.cli import training_rows
from peft_esft.cli.main import build_parser, main
from peft_esft.cli.train_options import CompareOptions, TrainOptions, parse
from peft_esft.cli.training_rows import read_rows

from repository import ROOT


# Both libraries announce changes of their own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
VERSES = ROOT / "examples" / "tiny_moe" / "tasks" / "verses.jsonl"
QUICK = ["--max-steps", "3", "--per-device-train-batch-size", "4", "--max-length", "64", "--logging-steps", "1"]


def pairs(number):
    rows = [json.loads(line) for line in VERSES.read_text().splitlines()[:number]]
    return [(row["prompt"].removesuffix("\n→ "), row["completion"]) for row in rows]


def conversations(number):
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in pairs(number)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "chat.jsonl", conversations(24))


def test_one_command_from_rows_to_an_adapter(chat, tmp_path, capsys):
    out = tmp_path / "law"
    assert main(["train", MODEL, chat, "--out", str(out), "--learning-rate", "3e-3", "--json", *QUICK]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report == json.loads((out / "train_report.json").read_text())
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    assert (report["rows"], report["held_out_rows"], report["format"], report["steps"]) == (22, 2, "messages", 3)
    assert "22 rows of messages; 2 held out (taken out of it at random)" in output.err

    config = ESFTConfig.from_pretrained(str(out))
    scores = ExpertScores.load(out / "scores.json")
    assert config.target_experts == ESFTConfig.from_scores(scores).target_experts
    assert config.base_model_name_or_path == MODEL and config.selection["task"] == "chat"
    assert report["experts"] == sum(map(len, config.target_experts.values()))
    assert report["trained_parameters"] == report["experts"] * 3 * 64 * 192
    assert set(report["routing"]) == set(config.target_experts)
    assert "ESFT adapter for" in (out / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(MODEL).chat_template

    # The reported losses are those of the base and of the saved adapter.
    rows = read_rows(chat).held_out
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out).eval()
    assert loss_on_answers(model, rows) == pytest.approx(report["held_out_loss"]["after"], rel=1e-4)
    with model.disable_adapter():
        assert loss_on_answers(model, rows) == pytest.approx(report["held_out_loss"]["before"], rel=1e-4)


@torch.no_grad()
def loss_on_answers(model, rows):
    tokenizer, total, tokens = AutoTokenizer.from_pretrained(MODEL), 0.0, 0
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=64
        )
        ids, answer = torch.tensor([ids["input_ids"]]), torch.tensor([ids["assistant_masks"]])
        count = int(answer[:, 1:].sum())
        if not count:
            continue  # the answer is cut off
        total += float(model(input_ids=ids, labels=ids.where(answer == 1, -100)).loss) * count
        tokens += count
    return total / tokens


@pytest.fixture
def piped(monkeypatch):
    """Gives a command a text as its standard input."""
    training_rows._rows_of_standard_input.cache_clear()
    yield lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))
    training_rows._rows_of_standard_input.cache_clear()


def test_rows_of_a_pipe_are_read_once_and_kept(piped):
    piped("".join(json.dumps(row) + "\n" for row in conversations(20)))
    first, again = read_rows("-"), read_rows("-")
    assert (len(first.train), len(first.held_out), first.format) == (18, 2, "messages")
    assert first.train[:] == again.train[:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the standard input is empty"),
        ('{"text": "a"}\nnone\n', "line 2 of the standard input is not JSON"),
        ("[1]\n", "line 1 of the standard input is not a JSON object"),
        ('{"title": "a"}\n', "- has title; a row has messages"),
    ],
)
def test_a_pipe_without_rows(text, message, piped):
    piped(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_rows("-")


def test_a_dry_run_says_all_and_writes_nothing(chat, tmp_path, capsys):
    assert main(["train", MODEL, chat, "--out", str(tmp_path / "law"), "--dry-run", "--num-train-epochs", "2"]) == 0
    text = capsys.readouterr().out
    for line in (
        "model ",
        "22 rows of messages",
        "of 64 in 4 layers",
        "trained ",
        "GB on one GPU",
        "steps    6, of 8 rows",
    ):
        assert line in text
    assert "learning rate 1e-05; the paper's" in text
    assert not (tmp_path / "law").exists()


@pytest.mark.parametrize(("command", "kind"), [("train", TrainOptions), ("compare", CompareOptions)])
def test_every_option_of_a_command_is_in_its_help(command, kind):
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    shown = {option for action in commands.choices[command]._actions for option in action.option_strings}
    named = {f"--{field.name.replace('_', '-')}" for field in fields(kind)} - {
        "--model-name-or-path",
        "--dataset-name",
    }
    elsewhere = set() if command == "train" else {"--top-p", "--budget", "--resume", "--dry-run"}
    assert named - shown == elsewhere


def test_defaults_and_other_options_of_trl(tmp_path):
    own, settings = parse(
        TrainOptions, ["M", "D", "--out", "x", "--warmup-steps", "5", "--packing", "--columns", "text=body"]
    )
    assert (own.model_name_or_path, own.dataset_name, own.columns) == ("M", "D", ["text=body"])
    assert (settings.output_dir, settings.warmup_steps, settings.packing) == ("x", 5, True)
    assert (settings.learning_rate, settings.router_aux_loss_coef, settings.gradient_checkpointing) == (
        1e-5,
        0.0,
        True,
    )
    assert settings.bf16 == torch.cuda.is_available() and settings.assistant_only_loss is None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: M\ndataset_name: D\noutput_dir: y\nlearning_rate: 3e-5\ntop_p: 0.1\n")
    for given in (["--config", str(recipe)], [f"--config={recipe}"]):
        own, settings = parse(TrainOptions, [*given, "--max-length", "99"])
        assert (own.model_name_or_path, own.dataset_name, own.top_p) == ("M", "D", 0.1)
        assert (settings.output_dir, settings.learning_rate, settings.max_length) == ("y", 3e-5, 99)
    assert parse(TrainOptions, ["--config", str(recipe), "--learning-rate", "1e-4", "N"])[1].learning_rate == 1e-4
    recipe.write_text("model_name_or_path: M\nbudget: 0.05\n")
    # DATA, as the recipe names the model
    own, _ = parse(TrainOptions, ["--config", str(recipe), "--out", "x", "rows.jsonl"])
    assert (own.model_name_or_path, own.dataset_name, own.budget) == ("M", "rows.jsonl", 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: MODEL, DATA"),
        (["M"], "required: DATA"),
        (["M", "D"], "required: --out"),
        (["M", "D", "--out", "x", "--lerning-rate", "1"], "--lerning-rate; did you mean --learning-rate?"),
        (["M", "D", "E", "--out", "x"], "unrecognized arguments: E; give MODEL DATA, then the options"),
        (["M", "D", "--out", "x", "--metric", "best"], "invalid choice: 'best'"),
        (["M", "D", "--out", "x", "--top-p", "much"], "invalid float value: 'much'"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(option in text for option in ("--top-p", "--learning-rate", "--packing", "--resume", "--config"))


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("model_name_or_path: M\ndataset_name: D\noutput_dir: y\ntop_q: 0.1\n")
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 1
    assert "unknown keys: --top_q; did you mean --top_p?" in capsys.readouterr().err


FILES = {
    "a.jsonl": '{"prompt": "p", "completion": "c"}\n' * 4,
    "a.json": '[{"text": "one"}, {"text": "two"}]',
    "a.csv": "prompt,completion\np,c\nq,d\n",
    "a.tsv": "text\tnumber\none\t1\ntwo\t2\n",
    "a.txt": "one\ntwo\nthree\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_format(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    rows = read_rows(str(tmp_path / name))
    assert rows.format == ("prompt and completion" if "prompt" in FILES[name] else "text")
    assert len(rows.held_out) == 1 and len(rows.train) >= 1
    assert set(rows.train.column_names) <= {"prompt", "completion", "text"}


def test_parquet_folders_and_splits(tmp_path):
    rows = Dataset.from_list([{"question": f"q{i}", "answer": f"a{i}", "extra": i} for i in range(20)])
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    rows.select(range(3)).to_parquet(tmp_path / "data" / "test.parquet")
    columns = ["prompt=question", "completion=answer"]
    read = read_rows(str(tmp_path / "data"), columns=columns)
    assert (len(read.train), len(read.held_out), read.origin) == (20, 3, "its split 'test'")
    assert read.train[1] == {"prompt": "q1", "completion": "a1"}
    rows.save_to_disk(tmp_path / "saved")
    read = read_rows(str(tmp_path / "saved"), str(tmp_path / "data"), columns=columns)
    assert (len(read.train), len(read.held_out)) == (20, 3)
    again = read_rows(str(tmp_path / "saved"), columns=columns)
    assert again.held_out["prompt"] == read_rows(str(tmp_path / "saved"), columns=columns).held_out["prompt"]
    assert (len(again.train), len(again.held_out)) == (18, 2)


def test_rows_that_name_their_split(tmp_path):
    rows = read_rows(str(VERSES))
    assert (len(rows.train), len(rows.held_out), rows.origin) == (1600, 200, "its column 'split'")


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        (
            "a.jsonl",
            '{"question": "q", "answer": "a"}\n' * 2,
            [],
            "has question, answer; a row has messages, or prompt",
        ),
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\n', [], "has 1 row; two are needed"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', [], "row 2 of"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n{"messages": []}\n', [], "row 2 of"),
        ("a.jsonl", '{"messages": "hi"}\n' * 2, [], "expected a list of {role, content}"),
        ("a.jsonl", '{"text": "x"}\nnonsense', [], "cannot be read"),
        ("a.jsonl", "", [], "is empty"),
        ("a.jsonl", "\n\n \n", [], "a.jsonl has no rows"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n' * 2, [], "a.jsonl is not UTF-8 text"),
        ("a.pdf", "x", [], "its format is not known"),
        ("a.jsonl", '{"text": "x"}\n' * 2, ["prompt=question"], "has no column 'question'; it has text"),
        ("a.jsonl", '{"text": "x"}\n' * 2, ["question"], "expected KIND=COLUMN"),
        ("a.csv", "body,n\nx,1\ny,2\n", ["text=n"], "text is 1; expected a text"),
    ],
)
def test_bad_data_is_refused_with_a_reason(name, content, columns, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    more = ["--columns", *columns] if columns else []
    assert main(["train", MODEL, str(tmp_path / name), "--out", str(tmp_path / "x"), *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peft-esft: ") and message in error
    assert not (tmp_path / "x").exists()


def test_what_does_not_fit_is_refused_before_training(chat, tmp_path, capsys):
    def refusal(*arguments):
        assert main(["train", *map(str, arguments)]) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "there is no file or folder 'missing.jsonl'" in refusal(MODEL, "missing.jsonl", "--out", tmp_path / "x")
    for option, value in (("--rank", 0), ("--top-p", 2), ("--score-tokens", 0)):
        refusal(MODEL, chat, "--out", tmp_path / "x", option, value)
        assert not (tmp_path / "x").exists()  # not even the empty folder that TRL's trainer makes
    assert "has no split 'dev'" in refusal(MODEL, chat, "--out", tmp_path / "x", "--dataset-train-split", "dev")
    assert "--dataset-config is for" in refusal(MODEL, chat, "--out", tmp_path / "x", "--dataset-config", "main")
    with pytest.raises(SystemExit):
        main(["train", MODEL, chat, "--out", str(tmp_path / "x"), "--dtype", "float8"])
    assert "argument --dtype: invalid choice: 'float8'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert "a file; it is the folder" in refusal(MODEL, chat, "--out", tmp_path / "file")
    assert "which holds a model" in refusal(MODEL, chat, "--out", MODEL)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    assert "holds a trained adapter already" in refusal(MODEL, chat, "--out", tmp_path / "old")

    dense = LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    dense.save_pretrained(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.save_pretrained(tmp_path / "dense")
    assert "is not a mixture of experts: Llama" in refusal(tmp_path / "dense", chat, "--out", tmp_path / "x")
    tokenizer.chat_template = None
    (tmp_path / "dense" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "dense")
    assert "has no chat template" in refusal(tmp_path / "dense", chat, "--out", tmp_path / "x")


def test_a_template_that_marks_no_answers_is_said(chat, tmp_path, capsys):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    more = ["--chat-template-path", str(template), "--dry-run", "--out", str(tmp_path / "x")]
    assert main(["train", MODEL, chat, *more]) == 0
    assert "marks no answers, so the loss is that of whole conversations" in capsys.readouterr().out


def test_given_scores_choose_and_a_rank_is_kept(chat, tmp_path, capsys):
    first = ["train", MODEL, chat, "--out", str(tmp_path / "a"), *QUICK, "--score-tokens", "100", "--rank", "2"]
    assert main(first) == 0
    config = ESFTConfig.from_pretrained(str(tmp_path / "a"))
    assert config.rank == 2 and config.selection["num_tokens"] == 100
    scores = str(tmp_path / "a" / "scores.json")
    assert main(["train", MODEL, str(VERSES), "--out", str(tmp_path / "b"), "--experts", scores, "--dry-run"]) == 0
    assert f"{sum(map(len, config.target_experts.values()))} in all" in capsys.readouterr().out


def test_a_budget_says_how_many_experts_are_trained(chat, tmp_path, capsys):
    first = ["train", MODEL, chat, "--out", str(tmp_path / "a"), "--budget", "0.05", "--dry-run"]
    assert main(first) == 0
    text = capsys.readouterr().out
    assert "12 in all; token score, budget 0.05, " in text and f"trained  {12 * 3 * 64 * 192:,} " in text
    assert main([*first, "--bits", "4"]) == 0
    stored = capsys.readouterr().out
    line = text.splitlines()[0]
    assert stored.startswith(line)  # the size of the model, and not of its codes

    def memory(text):
        return float(re.search(r"memory +([\d.]+) GB", text)[1])

    assert memory(stored) < memory(text)
    assert main([*first, "--top-p", "0.2"]) == 1
    assert "top_p" in capsys.readouterr().err


def test_a_budget_of_memory_is_filled(chat, tmp_path, capsys):
    first = ["train", MODEL, chat, "--out", str(tmp_path / "a"), "--max-length", "64", "--dry-run", "--json"]
    trained = []
    for flags in (["--bits", "4"], ["--bits", "4", "--optim", "adamw_8bit"]):
        assert main([*first, "--budget", "60MB", *flags]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert 0.7 * 0.9 * 60e6 < plan["memory_estimate_bytes"] <= 0.9 * 60e6
        assert plan["choice"]["budget"] == "0.06GB" and 0 < plan["choice"]["top_p"] <= 1
        trained.append(plan["trained_parameters"])
    assert trained[0] < trained[1]
    assert main([*first, "--budget", "1MB"]) == 1
    assert "does not fit a budget of" in capsys.readouterr().err
    assert main([*first, "--budget", "much"]) == 1
    assert "--budget is 'much'" in capsys.readouterr().err


def run(*arguments, **more):
    command = [sys.executable, "-m", "peft_esft", "train", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **more)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


LONG = ["--max-steps", "400", "--per-device-train-batch-size", "2", "--max-length", "48", "--seed", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_goes_on_where_it_was(number, chat, tmp_path):
    """With a checkpoint of the step at hand after Ctrl-C, from the last one of `--save-steps` after a kill."""
    out = tmp_path / "law"
    process = run(MODEL, chat, "--out", out, *LONG, "--save-steps", "5")
    wait_for(lambda: last_complete_checkpoint(out), process)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert "Traceback" not in error
    checkpoint = last_complete_checkpoint(out)
    steps = int(checkpoint.rpartition("-")[2])
    if number != signal.SIGKILL:
        assert f"stopped after step {steps} of 400; go on with the same command and --resume" in error
    assert not (out / "adapter_config.json").exists()

    short = ["--max-steps", str(steps + 3), "--per-device-train-batch-size", "2", "--max-length", "48", "--seed", "1"]
    process = run(MODEL, chat, "--out", out, *short)
    assert process.wait() == 1 and "go on with --resume" in process.stderr.read()
    process = run(MODEL, chat, "--out", out, *short, "--resume")
    assert process.wait() == 0, process.stderr.read()
    report = json.loads((out / "train_report.json").read_text())
    assert report["resumed_from"] == checkpoint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "1"], "--learning-rate was 0.001 and is 1.0"),
        (["--seed", "7"], "--seed was 1 and is 7"),
        (["--bits", "8"], "--bits was None and is 8"),
        (["--max-length", "8"], "--max-length was 64 and is 8"),
        (["--top-p", "0.5", "--rank", "4"], "--top-p was None and is 0.5; --rank was None and is 4"),
        (["--eval", str(VERSES)], "--eval was None and is "),
    ],
)
def test_other_options_than_a_run_was_started_with_are_refused(options, message, started, capsys):
    before = sorted(path.name for path in started.iterdir())
    command = ["train", MODEL, str(started.parent / "chat.jsonl"), "--out", str(started), *STARTED, *options]
    assert main([*command, "--resume"]) == 1
    assert message in (error := capsys.readouterr().err) and "Give the same ones" in error
    assert sorted(path.name for path in started.iterdir()) == before


def test_a_run_goes_on_with_the_same_options_and_more_steps(started, monkeypatch):
    monkeypatch.chdir(started.parent)  # the data by another spelling of its path
    steps = ["--max-steps", "3", "--out", str(started)]
    assert main(["train", MODEL, "chat.jsonl", *STARTED, *steps, "--resume"]) == 0
    assert json.loads((started / "train_report.json").read_text())["resumed_from"].endswith("checkpoint-2")


STARTED = ["--max-steps", "2", "--save-steps", "2", "--max-length", "64", "--seed", "1", "--learning-rate", "1e-3"]
STARTED += ["--per-device-train-batch-size", "4", "--score-tokens", "300"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of a run with a checkpoint, as an interrupt after it leaves it."""
    folder = tmp_path_factory.mktemp("started")
    data = write(folder / "chat.jsonl", conversations(24))
    assert main(["train", MODEL, data, "--out", str(folder / "law"), *STARTED]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "train_report.json"):
        (folder / "law" / name).unlink()
    return folder / "law"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """DDP on the CPU: twice the rows a step; all processes choose the same experts, and the first alone speaks."""
    chat = write(tmp_path / "chat.jsonl", conversations(24)[:20])  # as many rows as fill the batches of both
    held_out = write(tmp_path / "eval.jsonl", conversations(24)[20:])
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "examples" / "accelerate" / "ddp.yaml"), "-m", "peft_esft", "train"]
    out = tmp_path / "law"
    common = ["--learning-rate", "1e-3", "--max-steps", "4", "--logging-steps", "1", "--eval", held_out]
    common += ["--lr-scheduler-type", "constant"]
    arguments = [MODEL, chat, "--out", str(out), "--per-device-train-batch-size", "2", *common]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("loss on 4 held-out rows") == 1
    assert found.stderr.count("of 4 rows") == found.stderr.count("took") == 1, found.stderr
    warnings = [line for line in found.stderr.splitlines() if line.startswith("peft-esft: warning")]
    assert len(warnings) == len(set(warnings))
    alone = [MODEL, chat, "--out", str(tmp_path / "one"), "--per-device-train-batch-size", "4", *common]
    assert main(["train", *alone]) == 0
    both = json.loads((out / "train_report.json").read_text())
    one = json.loads((tmp_path / "one" / "train_report.json").read_text())
    assert both["rows_in_a_step"] == one["rows_in_a_step"] == 4
    assert both["held_out_loss"]["before"] == pytest.approx(one["held_out_loss"]["before"], rel=1e-4)
    assert both["held_out_loss"]["after"] < both["held_out_loss"]["before"]
    scores = [ExpertScores.load(folder / "scores.json") for folder in (out, tmp_path / "one")]
    assert scores[0].num_tokens == scores[1].num_tokens
    pairs = [{path: c.selected_pairs for path, c in own.containers.items()} for own in scores]
    assert pairs[0] == pairs[1]
