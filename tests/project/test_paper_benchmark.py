"""The comparison on the embedded models: it resumes, trains what it says, and its tables say what was measured."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch

from repository import ROOT


# A step or two reach few experts.
pytestmark = pytest.mark.filterwarnings("ignore:.*received no token in training")

sys.path[:0] = [str(ROOT / "benchmarks" / "paper"), str(ROOT / "benchmarks")]

import continued  # noqa: E402
import publish  # noqa: E402
import reporting  # noqa: E402
import run as runner  # noqa: E402
import tasks  # noqa: E402
from comparisons import COMPARISONS  # noqa: E402
from methods import METHODS, Choice  # noqa: E402
from plan import GRID, GROUP_SIZES, SHARED, Plan, Protocol, Run, chosen_lr, plan, plan_with_shared_experts  # noqa: E402
from results import Results  # noqa: E402
from store import Store  # noqa: E402
from tables import all_tables  # noqa: E402
from training import Sizes, Workbench  # noqa: E402


def few(number: int) -> dict[str, int]:
    return dict.fromkeys(continued.ALL, number)


TINY = Sizes(batch=few(2), validation=few(3), own=few(3), other=few(2), windows=1, scored=512)
EXPERT = {"olmoe": 3 * 64 * 192, "deepseek": 3 * 48 * 192}  # weights of one expert


@pytest.fixture(scope="module")
def bench():
    return Workbench(TINY)


@pytest.fixture(scope="module")
def bench_with_shared_experts():
    return Workbench(TINY, "deepseek")


def record(run: Run, *, validation=1.0, own=0.5, loss=1.0, general=3.0, experts=None, trained=10) -> dict:
    measured = {"loss": loss, "exact": own, "tokens": own}
    return {
        **asdict(run),
        "validation": {"loss": validation, "exact": own, "tokens": own},
        "tasks": dict.fromkeys(continued.ALL, measured),
        "general": {
            "scripture": {"loss": 9.0, "exact": 0.0, "tokens": 0.1},
            "german": {"loss": general, "exact": 0.0, "tokens": 0.4},
        },
        "cpu_seconds": 1.0,
        "trained_parameters": trained,
        "saved_bytes": 4 * trained,
        "experts": experts,
    }


def finish(protocol: Protocol, store: Store, best: float = 1e-3, plan: Plan = plan) -> list[Run]:
    """Carries out a plan with made-up results whose validation loss is least at `best`."""
    done = []
    for planned in plan(protocol, store):
        if not store.select(**asdict(planned)):
            store.append(record(planned, validation=1 + abs(GRID.index(best) - GRID.index(planned.lr or best))))
            done.append(planned)
    return done


def test_a_second_start_skips_what_is_done(tmp_path, bench, monkeypatch):
    monkeypatch.setattr(runner, "Workbench", lambda sizes, base: bench)
    path = tmp_path / "deep" / "runs.jsonl"
    protocol = Protocol(tasks=("verses",), repeated=(), continued=(), steps=1, grid=(1e-3,), seeds=1)
    comparison = replace(COMPARISONS["olmoe"], protocol=protocol, folder=path.parent)
    assert runner.carry_out(comparison, TINY, limit=2) == 2
    with path.open("a") as file:  # killed while it wrote
        file.write('{"task": "verses", "meth')
    before = path.read_text().splitlines()[:2]
    assert runner.carry_out(comparison, TINY, limit=1) == 1
    lines = path.read_text().splitlines()
    assert lines[:2] == before and len(lines) == 3
    assert [json.loads(line)["method"] for line in lines] == ["base", "full", "esft_token"]


def test_equal_runs_have_equal_results(bench):
    one, other = (bench.execute(Run("verses", "random", 1e-3, seed=1, steps=1)) for _ in range(2))
    del one["cpu_seconds"], other["cpu_seconds"]
    assert one == other
    assert one["tasks"] != bench.execute(Run("verses", "random", 1e-3, seed=2, steps=1))["tasks"]


@pytest.mark.parametrize("best", GRID)
def test_the_grid_is_tried_until_the_neighbours_of_the_best_are_known(tmp_path, best):
    protocol = Protocol(tasks=("verses",), repeated=("verses",))
    store = Store(tmp_path / "runs.jsonl")
    runs = finish(protocol, store, best)
    assert chosen_lr(store, "verses", "full", protocol.steps) == best
    tried = sorted({found.lr for found in runs if found.method == "full" and found.seed == 0})
    place = GRID.index(best)
    assert set(GRID[max(0, place - 1) : place + 2]) <= set(tried)
    chosen, gentler = {best}, set(GRID[max(0, place - 1) : place])
    assert {found.lr for found in runs if found.seed > 0 and found.method == "random"} == chosen
    assert {found.lr for found in runs if found.seed > 0 and found.method == "full"} == chosen | gentler
    assert len(set(runs)) == len(runs)
    assert not finish(protocol, Store(store.path), best)


@pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=list(COMPARISONS))
def test_processes_on_different_tasks_do_together_what_one_does(tmp_path, comparison):
    protocol, order = comparison.protocol, comparison.plan
    whole = finish(protocol, Store(tmp_path / "whole.jsonl"), plan=order)
    names = (*protocol.continued, *protocol.tasks)
    parts = [finish(protocol.only([name]), Store(tmp_path / f"{name}.jsonl"), plan=order) for name in names]
    assert all({run.task for run in part} == {name} for name, part in zip(names, parts, strict=True))
    assert {run for part in parts for run in part} == set(whole)
    assert sum(map(len, parts)) == len(whole) == len(set(whole))


def test_shared_experts_are_in_the_plan_of_the_base_that_has_them(tmp_path):
    protocol = Protocol(tasks=("verses",), repeated=("verses",), continued=())
    store = Store(tmp_path / "runs.jsonl")
    for size in (None, *GROUP_SIZES):
        store.append(record(Run("verses", "base", group_size=size), own=0.0, loss=5.0, general=2.0))
    runs = finish(protocol, store, plan=plan_with_shared_experts)
    for method in SHARED:
        assert {run.seed for run in runs if run.method == method and run.lr == 1e-3} == {0, 1, 2}
    table = all_tables(Results(Store(store.path), protocol.steps), {})["trained_verses"]
    assert all(f"| {name} |" in table for name in ("shared experts only", "ESFT-Token + shared experts"))


def test_validation_examples_are_neither_trained_nor_measured_on(bench):
    for task in continued.ALL:
        training, validation = bench.split(task)
        assert len(validation) == 3 and len(training) == 1597
        assert not set(validation) & {*training, *continued.load(task, "eval")}
    (batch,) = islice(bench.batches("verses", seed=0), 1)
    assert batch["input_ids"].shape[0] == 2


def test_continued_text_is_that_of_the_prompts():
    for task, source in continued.CONTINUED.items():
        pairs = zip(continued.load(task, "train"), tasks.load_task(source, "train"), strict=True)
        for (prompt, text), (asked, _) in pairs:
            assert prompt == "" and text and asked.startswith(text) and set(asked[len(text) :]) <= set(":\n→ ")


def changed(bench, method: str, choice: Choice) -> tuple[torch.nn.Module, set[str]]:
    """A model after one step, and the trained parameters that moved."""
    model = METHODS[method](copy.deepcopy(bench.base), choice)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    (batch,) = islice(bench.batches("verses", seed=0), 1)
    model(**batch).loss.backward()
    optimizer.step()
    return model, {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def test_methods_train_what_they_say(bench):
    choice = Choice(bench.scores("verses", None), seed=1)
    chosen = choice.select("token")
    trained, expert = sum(map(len, chosen.values())), EXPERT["olmoe"]
    matrices = 4 * 4 * 192 * 192  # attention
    rest = 4096 * 192 + matrices + 4 * 64 * 192 + 4 * 4 * 192 + 192  # embeddings, routers, norms
    lora = 8 * 64 * ((192 + 128) + (64 + 192))  # both matrices of all experts of a layer
    expected = {
        "full": rest + 4 * 64 * expert,
        "esft_token": trained * expert,
        "random": trained * expert,
        "esft_gate": sum(map(len, choice.select("gate").values())) * expert,
        "hot_lora": trained * 8 * ((192 + 128) + (64 + 192)),
        "lora_experts": 4 * lora,
        "lora_all": 4 * lora + 4 * 4 * 8 * (192 + 192) + 4 * 8 * (64 + 192),
        "esft_non_expert": rest + trained * expert,
        "non_expert": rest,
    }
    check_trained(bench, choice, expected)
    assert set(METHODS) == {"base", *expected, *SHARED}


def test_methods_train_what_they_say_of_shared_experts(bench_with_shared_experts):
    bench = bench_with_shared_experts
    choice = Choice(bench.scores("verses", None), seed=1)
    trained, expert = sum(map(len, choice.select("token").values())), EXPERT["deepseek"]
    attention = {(192, 6 * 32): 2, (192, 64 + 16): 1, (64, 6 * (16 + 32)): 1}
    dense, shared = {(192, 384): 2, (384, 192): 1}, {(192, 96): 2, (96, 192): 1}
    norms = 5 * (2 * 192 + 64) + 192

    def size(matrices: dict[tuple[int, int], int], rank: int | None = None) -> int:
        return sum(count * (a * b if rank is None else rank * (a + b)) for (a, b), count in matrices.items())

    rest = 4096 * 192 + norms + 5 * size(attention) + size(dense) + 4 * 64 * 192
    lora = 8 * 64 * ((192 + 96) + (48 + 192)) + 8 * (64 + 192)  # experts and router of a layer
    check_trained(
        bench,
        choice,
        {
            "full": rest + 4 * size(shared) + 4 * 64 * expert,
            "esft_token": trained * expert,
            "esft_shared": trained * expert + 4 * size(shared),
            "shared": 4 * size(shared),
            "esft_specialise": trained * expert + 4 * size(shared) + rest,
            "lora_all": 4 * lora + 5 * size(attention, 8) + size(dense, 8) + 4 * size(shared, 8),
        },
    )


def check_trained(bench, choice: Choice, expected: dict[str, int]) -> None:
    """Methods have these numbers of trained parameters, and nothing else moves."""
    for method, number in expected.items():
        model, moved = changed(bench, method, choice)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == number, method
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert moved and moved <= trainable, method


def test_random_experts_are_others_of_the_same_number(bench):
    scores = bench.scores("verses", None)
    chosen = Choice(scores).select("token")
    drawn = []
    for seed in (0, 1):
        model = METHODS["random"](copy.deepcopy(bench.base), Choice(scores, seed=seed))
        drawn.append(model.peft_config["default"].target_experts)
        assert {path: len(ids) for path, ids in drawn[-1].items()} == {path: len(ids) for path, ids in chosen.items()}
        assert drawn[-1] != chosen
    assert drawn[0] != drawn[1]


def test_coarse_models_train_whole_groups_and_keep_the_share_of_active_experts(bench):
    found = bench.execute(Run("verses", "esft_token", 1e-3, steps=1, group_size=8))
    assert all(count % 8 == 0 for count in found["experts"].values())
    assert found["trained_parameters"] == sum(found["experts"].values()) * EXPERT["olmoe"]
    groups = bench.groups(4)
    choice = Choice(bench.scores("verses", 4), groups=groups)
    for path, ids in choice.select("token").items():
        assert all(set(group) <= set(ids) or not set(group) & set(ids) for group in groups[path])
    seen = []
    router = bench.base.model.layers[0].mlp.gate
    for size in (1, 8):
        with bench.coarse(bench.base, size):
            handle = router.register_forward_hook(lambda module, args, result: seen.append(result[2].shape[1]))
            bench.base(torch.tensor([[5, 6, 7]]))
            handle.remove()
    assert seen == [8, 8]


def test_tables_say_what_was_measured(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    steps = Protocol().steps
    store.append(record(Run("verses", "base"), own=0.0, loss=5.0, general=3.0))
    for lr, loss in zip((3e-4, 1e-3, 3e-3), (0.9, 0.7, 0.8), strict=True):
        for method, general, own, experts in (("full", 7.0, 0.5, None), ("esft_token", 4.0, 0.4, {"a": 3, "b": 4})):
            run = Run("verses", method, lr, 0, steps)
            store.append(record(run, validation=loss, own=own, general=general, experts=experts))
    store.append(record(Run("verses", "full", 1e-3, 1, steps), own=0.6, general=8.0))
    # Tried at one learning rate only: nothing is known yet of which is best.
    store.append(record(Run("verses", "random", 1e-3, 0, steps)))
    results = Results(Store(store.path), steps)
    assert results.lr("verses", "full") == 1e-3 and results.lr("verses", "random") is None
    found = all_tables(results, {"verses": {"full": 1.0, "esft_token": 0.55}})
    rows = [line.strip("| ").split(" | ") for line in found["main_verses"].splitlines()]
    full, esft = "full fine-tuning", "ESFT-Token, p 0.2"
    gentler = [f"{name}, a third of the lr" for name in (full, esft)]
    assert [row[0] for row in rows[2:]] == ["base", full, gentler[0], esft, gentler[1]]
    # General text without the task's own domain, scripture; mean and standard deviation of two seeds.
    assert rows[3][1:4] == ["55.0 ± 7.1", "1.000 ± 0.000", "7.500 ± 0.707"]
    assert rows[4][-3:] == ["1.00", "0.0003", "1"]
    assert rows[5][1:] == ["40.0", "1.000", "4.000", "40.0", "3.5", "10", "0.00", "0.55", "0.001", "1"]
    assert "**0.700 · 40.0 · 4.00**" in found["grid_verses"]
    # Without all of the methods nothing is compared with full fine-tuning.
    assert found["summary"] == found["granularity_verses"] == ""
    page = "<!-- table summary -->\nold\n<!-- end -->\n<!-- table main_verses -->\n<!-- end -->\n"
    filled = reporting.fill_tables(page, found)
    assert reporting.MISSING in filled and "old" not in filled and found["main_verses"] in filled
    assert reporting.fill_tables(filled, found) == filled
    with pytest.raises(KeyError, match="nonsense"):
        reporting.fill_tables("<!-- table nonsense -->\n<!-- end -->", found)


def test_the_page_shows_the_committed_results():
    tables = {name: table for found in COMPARISONS.values() for name, table in publish.tables(found).items()}
    page = (ROOT / "docs" / "protocol.md").read_text()
    assert reporting.BLOCK.search(page)
    assert reporting.fill_tables(page, tables) == page
    for figure in re.findall(r"\(figures/(findings_\w+)\.svg\)", page):
        assert (ROOT / "docs" / "figures" / f"{figure}.svg").exists()
