"""`peft-esft eval`: base, ESFT and LoRA side by side, which rows it takes, general text, lm-eval, and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from pages import Page
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_esft import ESFTConfig, text_batches
from peft_esft.analysis import evaluate
from peft_esft.cli.main import main
from peft_esft.cli.training_rows import read_measured_rows, read_rows

from repository import ROOT


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
TASKS = ROOT / "examples" / "tiny_moe" / "tasks"
SHORT = ["--dtype", "float32", "--batch-size", "4"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters that change the base, rows of verses, general text."""
    folder = tmp_path_factory.mktemp("eval")
    esft = ESFTConfig(target_experts={layer: list(range(64)) for layer in range(4)}, task_type="CAUSAL_LM")
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    for name, config in (("law", esft), ("lora", lora)):
        torch.manual_seed(0)
        model = get_peft_model(load(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        model.save_pretrained(folder / name)
    verses = [json.loads(line) for line in (TASKS / "verses.jsonl").read_text().splitlines()[:10]]
    write(folder / "verses.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in verses])
    general = [json.loads(line) for line in (TASKS / "general.jsonl").read_text().splitlines()[:3]]
    write(folder / "general.jsonl", [{"text": row["text"]} for row in general])
    return folder


def test_base_and_adapters_side_by_side(folder, tmp_path, capsys):
    law, lora, data, general = (str(folder / name) for name in ("law", "lora", "verses.jsonl", "general.jsonl"))
    report = tmp_path / "page.html"
    more = ["--general", general, "--report", str(report), "--json", *SHORT]
    assert main(["eval", MODEL, law, f"other={lora}", data, *more]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["rows"], record["rows_from"], record["loss_of"]) == (10, "all of it", "answers")
    assert list(record["models"]) == ["base", "law", "other"]

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for name, path in (("base", None), ("law", law), ("other", lora)):
        found = record["models"][name]
        model = (load() if path is None else PeftModel.from_pretrained(load(), path)).eval()
        loss, exact, right = answers_measured_plainly(model, tokenizer, read_rows_of(data))
        assert found["loss"] == pytest.approx(loss, rel=1e-4)
        assert (found["exact_match"], found["token_accuracy"]) == pytest.approx((exact, right))
        total = tokens = 0
        for row in read_rows_of(general):
            ids = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=1024).input_ids
            with torch.no_grad():
                total, tokens = (
                    total + float(model(ids, labels=ids).loss) * (len(ids[0]) - 1),
                    tokens + len(ids[0]) - 1,
                )
        assert found["general"]["general"]["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert record["models"]["law"]["loss"] != record["models"]["base"]["loss"]
    change = record["models"]["law"]["general"]["general"]
    assert change["loss_change"] == pytest.approx(
        change["loss"] - record["models"]["base"]["general"]["general"]["loss"], abs=1e-5
    )
    page = Page(report.read_text())
    assert page.images == 3 and "other" in page.cells
    assert (tmp_path / "page_files" / "forgetting_general.csv").is_file()


@torch.no_grad()
def answers_measured_plainly(model, tokenizer, rows):
    """Loss, share of exact answers and of right tokens, row by row."""
    losses, right = [], []
    for row in rows:
        prompt, ids = tokenizer(row["prompt"]).input_ids, tokenizer(row["prompt"] + row["completion"]).input_ids
        start = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        logits = model(ids).logits[0, start - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="none").tolist()
        right.append((logits.argmax(-1) == ids[0, start:]).tolist())
    tokens = [is_right for row in right for is_right in row]
    return sum(losses) / len(losses), sum(map(all, right)) / len(right), sum(tokens) / len(tokens)


def read_rows_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_exact_match_is_what_generation_gives(folder):
    """A model that has learnt the rows generates exactly those answers that are counted."""
    rows, tokenizer = read_rows_of(folder / "verses.jsonl")[:6], AutoTokenizer.from_pretrained(MODEL)
    model = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = next(iter(text_batches(rows, tokenizer, answers_only=True)))
    for _ in range(7):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evaluate(model, text_batches(rows, tokenizer, answers_only=True, batch_size=1))
    right = 0
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids
        # The prompt ends with a space, which is in the answer's first token.
        start = torch.tensor([ids[: len(tokenizer(row["prompt"].rstrip(" ")).input_ids)]])
        text = tokenizer.decode(model.generate(start, max_new_tokens=12, do_sample=False)[0])
        right += text == row["prompt"] + row["completion"] + tokenizer.eos_token
    assert found.exact_match == right / len(rows) and right > 0


def test_the_table_and_a_pipe(folder):
    """Through a pipe: the table alone is in the standard output."""
    command = [
        sys.executable,
        "-m",
        "peft_esft",
        "eval",
        MODEL,
        str(folder / "law"),
        str(folder / "verses.jsonl"),
        *SHORT,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([*command, "--max-rows", "4"], env=env, capture_output=True, text=True, check=True)
    first, header, base, law = found.stdout.splitlines()
    assert first.startswith(
        "4 rows of prompt and completion of verses (all of it, the first 4 of 10); loss of answers"
    )
    assert header.split() == ["model", "loss", "exact", "match", "tokens", "right"]
    assert base.startswith("base ") and law.startswith("law ")
    assert "give --general DATA" in found.stderr and "Traceback" not in found.stderr


def test_which_rows_are_measured(tmp_path):
    rows = [{"text": f"row {number}"} for number in range(20)]
    data = write(tmp_path / "a.jsonl", rows)
    assert len(read_measured_rows(data)[0]) == 20
    held_out, _, origin = read_measured_rows(data, seed=7)
    assert held_out["text"] == read_rows(data, seed=7).held_out["text"] and origin == "those that training held out"
    marked = write(tmp_path / "b.jsonl", [row | {"split": "test" if n < 3 else "train"} for n, row in enumerate(rows)])
    assert read_measured_rows(marked, seed=7)[0]["text"] == ["row 0", "row 1", "row 2"]
    assert len(read_measured_rows(marked, split="train")[0]) == 17
    with pytest.raises(ValueError, match="has no rows of a split 'dev'"):
        read_measured_rows(marked, split="dev")


def test_the_rows_that_training_held_out(folder, tmp_path, capsys):
    """An adapter's report says that it was trained on the same file: the rows it has seen are left out."""
    data = str(folder / "verses.jsonl")
    (tmp_path / "law").symlink_to(folder / "law")
    report = {"data": data, "held_out_from": "taken out of it at random", "seed": 5}
    (folder / "law" / "train_report.json").write_text(json.dumps(report))
    try:
        assert main(["eval", MODEL, str(folder / "law"), data, "--json", *SHORT]) == 0
    finally:
        (folder / "law" / "train_report.json").unlink()
    record = json.loads(capsys.readouterr().out)
    assert (record["rows"], record["rows_from"]) == (1, "those that training held out")


def test_conversations_and_texts(folder, tmp_path, capsys):
    pairs = read_rows_of(folder / "verses.jsonl")[:3]
    turns = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in pairs]
    chat = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    assert main(["eval", MODEL, write(tmp_path / "chat.jsonl", chat), "--json", *SHORT]) == 0
    assert json.loads(capsys.readouterr().out)["loss_of"] == "answers"
    assert (
        main(["eval", MODEL, str(folder / "general.jsonl"), "--general", str(folder / "general.jsonl"), *SHORT]) == 0
    )
    output = capsys.readouterr().out
    assert "loss of whole rows" in output and "exact match" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DATA is missing"),
        (["{}/law"], "DATA is missing, the rows to measure on: peft-esft eval MODEL [ADAPTER ...] DATA"),
        (["{}/law", "{}/missing.jsonl"], "there is no file or folder '{}/missing.jsonl'"),
        (["{}/lav", "{}/verses.jsonl"], "there is no folder '{}/lav'; did you mean {}/law?"),
        (["{}/law", "{}/law", "{}/verses.jsonl"], "two adapters are called 'law'"),
        (["base={}/law", "{}/verses.jsonl"], "an adapter is called 'base'"),
        (["{}/verses.jsonl", "--max-rows", "0"], "--max-rows is 0; it is at least 1"),
        (["{}/verses.jsonl", "--split", "dev"], "has no rows of a split 'dev'"),
        (["{}/verses.jsonl", "--report", "{}/none/x.html"], "its folder does not exist"),
        (["{}/verses.jsonl", "--general", "{}/missing.jsonl"], "there is no file or folder"),
        (["{}/verses.jsonl", "{}/verses.jsonl"], "{}/verses.jsonl is a file, not an ESFT adapter or a PEFT adapter"),
        (["{}/verses.jsonl", "--limit", "3"], "--limit and --include-path are for lm-eval's tasks"),
        (["{}/verses.jsonl", "--include-path", "{}"], "--limit and --include-path are for lm-eval's tasks"),
        (["--tasks", "x", "--split", "dev"], "--columns and --split are of DATA"),
        (["--tasks", "x", "--columns", "text=a"], "--columns and --split are of DATA"),
        (["{}/mute.jsonl"], "row 1 of mute: no token of its messages is marked as an answer"),
    ],
)
def test_refusals(arguments, message, folder, capsys):
    write(folder / "mute.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    assert main(["eval", MODEL, *(text.replace("{}", str(folder)) for text in arguments)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and error.startswith("peft-esft: ")
    assert message.replace("{}", str(folder)) in error


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(load(), [{"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, -100]])}])


@pytest.mark.slow
def test_tasks_of_lm_eval(folder, tmp_path, monkeypatch, capsys):
    """With a task of a file, on the base and on an adapter."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    records = [
        {"prompt": row["prompt"], "choices": ["Isa", "Psa", "Lev"], "answer": 0}
        for row in read_rows_of(folder / "verses.jsonl")
    ]
    write(tmp_path / "books.jsonl", records)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "books.yaml").write_text(
        f"task: books\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'books.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\n"
        "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = ["--include-path", str(tmp_path / "tasks"), "--json", *SHORT]
        assert main(["eval", MODEL, str(folder / "law"), "--tasks", "books", *more]) == 0
        record = json.loads(capsys.readouterr().out)
        assert main(["eval", MODEL, "--tasks", "no_such_task", *more]) == 1
    assert "lm-eval has no task 'no_such_task'" in capsys.readouterr().err
    for model in record["models"].values():
        assert 0 <= model["tasks"]["books"]["acc"] <= 1
