"""The README's example, and the embedded model and tasks that the demo stands on."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from peft_esft import score_experts

import tasks
from repository import ROOT


@pytest.fixture(scope="module")
def embedded():
    return tasks.load_base()


def test_the_readme_example_runs(tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile("\n".join(code), "README.md", "exec"), namespace)
    saved = (tmp_path / "law" / "adapter_model.safetensors").stat().st_size
    rows = sum(
        len(ids) * 3 * 64 * 192 * 4 for ids in namespace["config"].target_experts.values()
    )  # gate, up and down of each chosen expert, in fp32
    assert rows < saved <= 1.01 * rows
    assert type(namespace["merged"]).__name__ == "OlmoeForCausalLM"


@pytest.mark.slow
def test_the_snippets_of_the_analysis_page_run_in_order(tmp_path, monkeypatch, capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "analysis.md").read_text(), flags=re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile("\n".join(code), "analysis.md", "exec"), {})
    assert "by chance: 0.56" in capsys.readouterr().out
    assert (tmp_path / "report_files" / "overlap.csv").exists()
    assert "God" in (tmp_path / "tokens.html").read_text()


def test_the_snippets_of_the_serving_page_run_in_order(tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile("\n".join(code), "serving.md", "exec"), namespace)
    assert namespace["model"].active_adapters == ["both"]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_are_whole_and_their_splits_disjoint(name):
    train, held_out = tasks.load_task(name, "train"), tasks.load_task(name, "eval")
    assert (len(train), len(held_out)) == (1600, 200)
    assert not set(train) & set(held_out)
    assert len(set(train)) == 1600


def test_batches_mask_padding_and_prompts(embedded):
    _, tokenizer = embedded
    batch = tasks.make_batch([("a prompt\n→ ", "yes"), ("", "a longer completion, to be continued")], tokenizer)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        answer = labels != tasks.IGNORED
        assert not (answer & ~mask.bool()).any()
        assert torch.equal(ids[answer], labels[answer])
    text = tokenizer.decode(batch["labels"][0][batch["labels"][0] != tasks.IGNORED])
    assert text == "yes<|endoftext|>"


def test_the_embedded_model_routes_by_domain(embedded):
    """The six most used experts agree far more within a domain than between domains."""
    model, tokenizer = embedded
    halves = {}
    for domain, windows in tasks.load_general().items():
        halves[domain] = []
        for part in (windows[::2], windows[1::2]):
            examples = [("", window) for window in part]
            scores = score_experts(model, tasks.batches(examples, tokenizer), progress=False)
            halves[domain].append(scores.token())

    def shared(one, other):
        common = [len(set(one[p].topk(6).indices.tolist()) & set(other[p].topk(6).indices.tolist())) for p in one]
        return sum(common) / len(common)

    within = [shared(*pair) for pair in halves.values()]
    between = [shared(halves[a][0], halves[b][1]) for a in halves for b in halves if a != b]
    assert len(halves) == 6
    assert sum(within) / len(within) > 4
    assert sum(between) / len(between) < 2
    assert min(within) > max(between)
