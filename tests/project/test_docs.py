"""Python blocks of the README and of every page of the docs run as they stand, in their order."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_esft
from peft_esft import ESFTConfig, ESFTLayer, analysis, interchange, score_experts
from peft_esft.cli.main import main
from peft_esft.interchange import compact
from peft_esft.ops.encodings import FORMS

import tasks
from checkpoints import save_base_and_adapter
from families import tiny_model
from repository import ROOT


HERE = ("choosing.md", "cli.md", "faq.md", "format.md", "index.md", "migration.md", "quantised.md", "quickstart.md")
"""The pages that this file runs."""
ELSEWHERE = {
    "README.md": "test_examples.py",
    "analysis.md": "test_examples.py",
    "converting.md": "test_interchange_docs.py",
    "engines.md": "test_trainers.py",
    "scaling.md": "test_optimizers.py",
    "serving.md": "test_examples.py",
    "sharing.md": "test_interchange_docs.py",
    "tour.md": "test_tour.py",
    "training.md": "test_trainers.py",
}
"""Pages whose examples need more preparation, and the files that run them."""


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working folder in which the examples lie where they do in a clone."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def _run(page: str, namespace: dict[str, object]) -> dict[str, object]:
    blocks = _blocks(ROOT / "docs" / page, "python")
    assert blocks
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    return namespace


def test_every_page_with_examples_is_run_by_a_test():
    pages = {page.name for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if _blocks(page, "python")}
    assert pages == {*HERE, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        (file,) = (ROOT / "tests").rglob(test)
        assert page in file.read_text()
    languages = {
        (page.name, language)
        for page in (ROOT / "docs").glob("*.md")
        for language in re.findall(r"^ *```(\w+)", page.read_text(), flags=re.MULTILINE)
    }
    assert {language for _, language in languages} <= {"python", "sh", "text", "json"}


@pytest.mark.slow
def test_quickstart(clone, capsys, recwarn):
    namespace = _run("quickstart.md", {})
    assert namespace["after"] < 0.5 * namespace["before"]
    assert (clone / "sections_adapter" / "adapter_model.safetensors").stat().st_size < 2.3e6
    first_row, listed, shown, counted, trained, answered = _blocks(ROOT / "docs" / "quickstart.md", "text")
    printed = capsys.readouterr().out
    assert printed.startswith(first_row + listed + counted)
    losses = [re.findall(r"\d\.\d\d", text.split("loss on held-out answers:")[1]) for text in (printed, trained)]
    assert [float(loss) for loss in losses[0][:2]] == pytest.approx([float(loss) for loss in losses[1]], rel=0.1)
    assert printed.endswith(answered)
    answers = [line.split(" | expected: ") for line in answered.splitlines()]
    assert len(answers) == 3 and all(answer == expected for answer, expected in answers)
    (command,) = [line for line in _blocks(ROOT / "docs" / "quickstart.md", "sh") if "peft-esft select" in line]
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == shown


def test_choosing(clone, capsys):
    model, tokenizer = tasks.load_base()
    texts = [prompt + completion for prompt, completion in tasks.load_task("verses", "train")[:100]]
    _run("choosing.md", {"model": model, "tokenizer": tokenizer, "texts": texts})
    (figure,) = (clone / "routing_files").glob("shares_token_verses.svg")
    assert "expert" in figure.read_text()
    assert capsys.readouterr().out


def test_quantised(clone):
    namespace = _run("quantised.md", {})
    assert "nf4" not in str(namespace["model"]) and "int8" in str(namespace["model"])


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    listed = [re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in listed]  # a function in a file of its name
    public = {f"{module.__name__}.{name}" for module in (peft_esft, analysis, interchange) for name in module.__all__}
    assert len(listed) == len(set(listed))
    assert {name for name in listed if not name.startswith("peft_esft.checkpoints.")} == public


def test_the_design_page_names_every_wing_and_only_files_that_exist():
    page = (ROOT / "docs" / "design.md").read_text()
    parts = {path for path in (ROOT / "peft_esft").iterdir() if path.name != "__pycache__"}
    named = {part.name for part in parts if f"`{part.name}{'/' * part.is_dir()}`" in page}
    assert {part.name for part in parts} - named <= {"__init__.py", "py.typed"}
    wings = dict(re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", page, flags=re.MULTILINE))
    assert len(wings) == 7
    for wing, start in wings.items():
        assert all((ROOT / "peft_esft" / wing / file).is_file() for file in re.findall(r"`([\w/]+\.py)`", start))
    mentioned = [name for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page) if name.partition("/")[0] in wings]
    assert mentioned and all((ROOT / "peft_esft" / name).is_file() for name in mentioned)


def test_the_start_page(clone):
    model, tokenizer = tasks.load_base()
    batches = list(tasks.batches(tasks.load_task("verses", "train")[:16], tokenizer))
    other = ESFTConfig(target_experts={1: [5]}, task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(tasks.load_base()[0], other).save_pretrained("intent")
    namespace = _run("index.md", {"model": model, "batches": batches, "base": tasks.load_base()[0]})
    assert namespace["model"].active_adapters == ["intent"]


def test_questions(clone, capsys):
    namespace = _run("faq.md", {})
    printed = capsys.readouterr().out
    adapted = get_peft_model(namespace["model"], namespace["config"])
    adapted.save_pretrained("asked")
    size = (clone / "asked" / "adapter_model.safetensors").stat().st_size / 1e6
    assert f"{size:.2f} MB" in printed
    assert "token 0.2 3 experts" in printed
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    (shown,) = _blocks(ROOT / "docs" / "faq.md", "text")
    with pytest.raises(ValueError, match=re.escape(" ".join(shown.split()))):
        get_peft_model(dense, ESFTConfig(target_experts={0: [0]}))


def test_migration(clone):
    namespace = _run("migration.md", {})
    assert namespace["target_experts"]["model.layers.2.mlp.experts"] == [5]


def _figure(benchmark: str, column: str, **where: object) -> str:
    """A cell of a benchmark's results, as a page quotes it: without the median in brackets."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text())["rows"]
    (row,) = [row for row in rows if all(row[name] == value for name, value in where.items())]
    cell = row[column]
    return cell.split(" ")[0] if isinstance(cell, str) else f"{cell:.2f}"


def test_figures_of_the_migration_page_are_those_of_the_benchmarks():
    page = (ROOT / "docs" / "migration.md").read_text()
    prefill = {"case": "prefill 1 x 1,024", "dtype": "float32"}
    decode = {"case": "decode 1 x 1", "dtype": "float32"}
    step = {"dtype": "float32", "checkpointing": False}
    lora, own = (
        [_figure("inference", way, **case) for case in (prefill, decode)] for way in ("LoRA r 16", "unmerged")
    )
    held = [_figure("memory", "over the base", way=way, **step) for way in ("LoRA r 16", "ESFT")]
    assert f"prefill takes {lora[0]} times the base's time and ESFT's {own[0]}" in " ".join(page.split())
    assert f"decoding takes {float(lora[1]):.1f} times the base's time and ESFT's {own[1]}" in " ".join(page.split())
    assert f"holds {held[0]} times the memory of the frozen base and ESFT {held[1]}" in " ".join(page.split())


def _table(text: str) -> dict[str, list[str]]:
    """The rows of tables by their first cell; numbers without marks and deviations."""
    lines = [line.strip()[1:-1] for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {row[0]: [re.sub(r"\*| ±.*", "", cell) for cell in row[1:]] for row in rows}


def _shown(page: str, name: str) -> dict[str, list[str]]:
    """A table of a page, by its name in the comment above it.

    A benchmark's program writes the tables under "table NAME"; those under "quoted NAME" are written by hand.
    """
    text = (ROOT / page).read_text()
    return _table(re.split(f"<!-- (?:table|quoted) {name} -->", text)[1].split("<!-- end -->")[0])


def test_figures_of_the_readme_are_those_of_the_results():
    switch = _figure("swap", "ratio or time", operation="switch between two adapters of 26 layers")
    assert f"[{switch} ms](benchmarks/results/swap.md)" in (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_quotes_the_recipes_memory():
    recipes = (ROOT / "examples" / "recipes" / "README.md").read_text()
    found = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| \[([\w.-]+)\]\(\S+\) \|(.*)\|$", recipes, flags=re.MULTILINE)
    }
    shown = _shown("README.md", "recipes")
    cards = [card.replace(" GB", "gb") for card in shown.pop("model")]
    assert len(cards) == 3 and len(shown) == 4
    for model, cells in shown.items():
        for card, cell in zip(cards, cells, strict=True):
            form, trained, _, _, memory, _ = found[f"{model.lower()}-{card}"]
            assert cell == f"{form}, {trained.replace(' experts', '')}, {memory.removesuffix(' GB')}"


METHODS = {"ESFT": "ESFT-Token, p 0.2", "ESFT, a third of the lr": "ESFT-Token, p 0.2, a third of the lr"}
"""Methods by their names on the page that compares ESFT with others, and in the tables of the findings."""


def test_the_page_on_deciding_quotes_one_task_as_measured():
    measured = _shown("docs/protocol.md", "main_verses")
    columns = [measured["method"].index(name) for name in ("exact answers, %", "general loss", "saved MB")]
    rows = {name: cells for name, cells in _shown("docs/deciding.md", "deciding_verses").items() if name.strip("-*")}
    assert len(rows) == 6
    for name, cells in rows.items():
        found = [measured[METHODS.get(name.strip("*"), name.strip("*"))][column] for column in columns]
        expected = [cell and f"{float(cell):.{digits}f}" for cell, digits in zip(found, (1, 2, 2), strict=True)]
        assert cells == expected, name


def test_the_page_on_deciding_quotes_the_shares_of_full_fine_tuning_as_measured():
    measured = _shown("docs/protocol.md", "summary")
    tasks_measured = measured.pop("of full fine-tuning's, %")
    shown = _shown("docs/deciding.md", "deciding_shares")
    tasks_shown = shown.pop("")
    rows = {name: cells for name, cells in shown.items() if name.strip("-")}
    assert len(rows) == 8
    for name, cells in rows.items():
        method, _, kind = name.partition(": ")
        place = {"gain": 0, "loss added on other text": 2}[kind]
        found = measured[METHODS.get(method, method)]
        expected = [found[tasks_measured.index(task)].split(" · ")[place] for task in tasks_shown]
        assert cells == expected, name


@pytest.mark.parametrize("figure", ["1.24 to 1.42 times", "33.2 GB"])
def test_figures_of_gpus_are_those_of_their_page(figure):
    for page in ("deciding.md", "gpu.md"):
        assert figure in " ".join((ROOT / "docs" / page).read_text().split())


def test_commands(clone, capsys):
    """Each line of the page on the command line, with a model and adapters in the place of its names."""
    model, tokenizer = tasks.load_base()
    for name, task in (("task", "verses"), ("other", "sections")):
        scores = score_experts(model, tasks.batches(tasks.load_task(task, "train")[:16], tokenizer), progress=False)
        scores.save(f"{name}.json")
        get_peft_model(tasks.load_base()[0], ESFTConfig.from_scores(scores, init_weights=False)).save_pretrained(name)
    (clone / "task.jsonl").write_text(
        '{"text": "In the beginning God created"}\n{"text": "the heaven and the earth"}\n'
    )
    (clone / "general.jsonl").write_text('{"text": "SEE ALSO"}\n')
    names = {"MODEL": "examples/tiny_moe/model", "ADAPTER": "task", "OTHER_ADAPTER": "other", "OTHER": "other"}
    names["other=OTHER"] = "other=other"
    (block,) = _blocks(ROOT / "docs" / "cli.md", "sh")
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "peft-esft"
        assert main([names.get(argument, argument) for argument in arguments]) == 0, capsys.readouterr().err
    model.name_or_path = names["MODEL"]
    namespace = _run("cli.md", {"model": model})
    assert namespace["config"].target_experts


@pytest.mark.parametrize("form", [*FORMS, "rank"])
def test_the_reader_of_the_format_page_reads_every_form(form, tmp_path):
    def base() -> LlamaForCausalLM:
        return tiny_model("olmoe", torch.bfloat16)

    settings = {"rank": 3, "alpha": 5.0, "use_rslora": True} if form == "rank" else {}
    save_base_and_adapter(base, tmp_path, task_type="CAUSAL_LM", **settings)
    folder = tmp_path / "adapter"
    if form not in ("delta", "rank"):
        folder = Path(compact(folder, tmp_path / "small", form=form))
    read = _run("format.md", {})["read_adapter"](folder)
    model = PeftModel.from_pretrained(base(), folder)
    for layer in (module for module in model.modules() if isinstance(module, ESFTLayer)):
        ids = layer.expert_ids["default"]
        for name, weight in layer.weights.items():
            found = torch.tensor(read.pop(f"{layer.path}.esft_{name}")).float()
            if form != "rows":
                found += torch.stack(list(weight.rows(layer.get_base_layer(), ids)))
            expected = layer.effective_rows(name, ["default"])
            tolerance = 0.02 if form == "rank" else 0  # a product of matrices is summed in another order
            torch.testing.assert_close(found.to(torch.bfloat16), expected, rtol=tolerance, atol=tolerance)
    assert not read
