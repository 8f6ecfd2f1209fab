"""The comparison of criteria: equal budgets, honest measures, exact tests, and a page that says what was measured."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch

from peft_esft import select_experts

from repository import ROOT


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*received no token in training"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]

sys.path[:0] = [str(ROOT / "benchmarks" / name) for name in ("selection", "paper", "")]

import cells  # noqa: E402
import choose  # noqa: E402
import choosing_page  # noqa: E402
import reporting  # noqa: E402
import tasks  # noqa: E402
from cells import CELLS, FRESH, SEEN, Cell  # noqa: E402
from choice import select  # noqa: E402
from evidence import Evidence, Setting, holm, rank_correlation, sign_flip, task_change  # noqa: E402
from schedule import SAME_LR, SMALL, USUAL, Trial, schedule, without_repeats  # noqa: E402
from trials import Workbench, evaluate  # noqa: E402


@pytest.fixture(scope="module")
def bench():
    return Workbench("olmoe", steps=1, rows=8)


@pytest.fixture(scope="module")
def scores(bench):
    return {task: bench.scores(task, 0) for task in ("russian", "verses")}


def record(
    cell: Cell, criterion: str, loss: float, *, seed=0, lr=SAME_LR, top_p=USUAL, validation=1.0, general=3.0, steps=100
):
    return {
        **asdict(Trial(*cell, criterion, top_p, lr, seed, steps=steps)),
        **{"loss": 2 * loss, "first": 9.0, "rest": loss, "exact": 0.5, "tokens": 0.5, "validation": validation},
        "general": {"english": general, "german": general + 1},
        **{"experts": [[1, 2], [3]], "trained_parameters": 3, "cpu_seconds": 1.0},
        **{"scoring_seconds": 1.0, "scored_tokens": 1000},
    }


def test_every_criterion_gets_as_many_experts_of_each_layer_as_the_token_share(scores):
    for top_p in (0.1, 0.4):
        counts = [len(ids) for ids in select_experts(scores["russian"].tables["token"], top_p=top_p).values()]
        names = (*scores["russian"].tables, "contrast", "random", "sink", "sink_last")
        chosen = {name: select(scores["russian"], name, top_p=top_p, seed=0) for name in names}
        for ids in chosen.values():
            assert [len(own) for own in ids.values()] == counts
            assert all(len(set(own)) == len(own) for own in ids.values())
        assert chosen["random"] != select(scores["russian"], "random", top_p=top_p, seed=1)
        everywhere = select(scores["russian"], "gradnorm", top_p=top_p, seed=0, where="global")
        assert sum(map(len, everywhere.values())) == sum(counts)


def test_what_is_taken_over_all_layers_has_the_highest_scores(scores):
    chosen = select(scores["verses"], "gradnorm", top_p=0.2, seed=0, where="global")
    table = scores["verses"].tables["gradnorm"]
    taken = [float(table[path][expert]) for path, ids in chosen.items() for expert in ids]
    left = [float(x) for path, row in table.items() for i, x in enumerate(row) if i not in chosen.get(path, ())]
    assert min(taken) >= max(left)


def test_an_expert_of_the_first_position_replaces_the_last_of_a_layer(scores):
    own = scores["russian"]
    token, sink, last = (select(own, name, top_p=0.4, seed=0) for name in ("token", "sink", "sink_last"))
    *before, final = token
    for path, ids in token.items():
        serving = int(own.tables["first"][path].argmax())
        replaced = ids if serving in ids else [*ids[:-1], serving]
        assert sink[path] == (ids if path == final else replaced)
        assert last[path] == (replaced if path == final else ids)
    assert any(sink[path] != token[path] for path in before)


def test_the_first_position_is_routed_alone_as_it_is_in_its_row(bench, scores):
    seen = []
    router = bench.base.model.layers[2].mlp.gate
    handle = router.register_forward_hook(lambda module, args, result: seen.append(result[2][0]))
    rows = bench.split("russian", "train")
    with torch.no_grad():
        bench.base(**tasks.make_batch(rows[:1], bench.tokenizer))
    handle.remove()
    mass = scores["russian"].tables["first"][bench.paths[2]]
    assert set(seen[0].tolist()) == set(mass.nonzero().flatten().tolist())  # every row starts with the end of text


def test_gradient_norms_are_those_of_autograd(bench, scores):
    model = bench.base
    rows = bench.split("verses", "train")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4242)).tolist()
    batch = tasks.make_batch([rows[place] for place in order], bench.tokenizer)
    path = bench.paths[1]
    weights = list(model.get_submodule(path).parameters())
    gradients = torch.autograd.grad(model(**batch).loss, weights)
    weights = [weight.detach() for weight in weights]
    for expert in (0, 17):
        norm = torch.cat([gradient[expert].flatten() for gradient in gradients]).norm()
        product = sum(float((g[expert] * w[expert]).abs().sum()) for g, w in zip(gradients, weights, strict=True))
        assert float(scores["verses"].tables["gradnorm"][path][expert]) == pytest.approx(float(norm), rel=1e-4)
        assert float(scores["verses"].tables["saliency"][path][expert]) == pytest.approx(product, rel=1e-4)


def test_the_first_token_is_measured_apart(bench):
    rows = bench.split("russian", "eval")
    found = evaluate(bench.base, bench.tokenizer, rows)
    batches = [tasks.make_batch([row], bench.tokenizer) for row in rows]
    trained = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert found["loss"] * trained == pytest.approx(found["first"] * 8 + found["rest"] * (trained - 8), rel=1e-5)
    assert found["loss"] == pytest.approx(tasks.evaluate(bench.base, bench.tokenizer, rows)["loss"], rel=1e-5)
    with torch.no_grad():
        logits = bench.base(input_ids=batches[0]["input_ids"][:, :1]).logits[0, 0]
    first = -logits.log_softmax(-1)[batches[0]["input_ids"][0, 1]]
    assert evaluate(bench.base, bench.tokenizer, rows[:1])["first"] == pytest.approx(float(first), rel=1e-4)


def test_no_text_is_used_for_two_purposes():
    for task in cells.OWN:
        parts = [cells.load(task, split) for split in ("train", "validation", "eval")]
        assert all(parts) and len(parts[1]) == cells.VALIDATION
        assert not {*parts[0]} & {*parts[1]}
        measured, subtracted = cells.general_text(tasks.load_general(), task)
        assert cells.OWN[task] not in measured and set(subtracted) < set(measured)
        assert not any({*measured[name]} & {*texts} for name, texts in subtracted.items())


def test_a_second_start_goes_on(tmp_path, bench, monkeypatch):
    monkeypatch.setattr(choose, "Workbench", lambda base: bench)
    assert choose.carry_out(["olmoe"], tmp_path, limit=2) == 2
    path = tmp_path / "olmoe.jsonl"
    with path.open("a") as file:  # killed while it wrote
        file.write('{"base": "olmoe", "ta')
    assert choose.carry_out(["olmoe"], tmp_path, limit=1) == 1
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["criterion"] for line in found] == ["base", "token", "gradnorm"]
    assert found[0]["trained_parameters"] == 0
    assert found[1]["trained_parameters"] == found[2]["trained_parameters"]
    assert found[1]["trained_parameters"] == sum(map(len, found[1]["experts"])) * 3 * 64 * 192


def test_equal_trials_have_equal_results_and_equal_choices_are_trained_once(bench, monkeypatch):
    trial = Trial("olmoe", "verses", "token")
    first, second = bench.execute(trial), bench.execute(trial)
    for found in (first, second):
        del found["cpu_seconds"]
    assert first == second
    monkeypatch.setattr(bench, "_train", None)  # which a result that is taken over does not call
    small = replace(trial, criterion="gate", top_p=USUAL)
    same = {**first, "experts": [sorted(ids) for ids in bench._select(small)[0].values()], "cpu_seconds": 1.0}
    assert bench.execute(small, [same])["loss"] == first["loss"]
    assert bench.execute(small, [same])["criterion"] == "gate"


def test_the_schedule_repeats_nothing():
    trials = list(without_repeats(schedule()))
    assert len(trials) == len(set(trials))
    parts = [list(without_repeats(schedule(), [base])) for base in cells.BASES]
    assert {trial for part in parts for trial in part} == set(trials)
    assert not SEEN & set(FRESH) and SEEN | set(FRESH) == set(CELLS)


def test_attention_beside_half_of_the_experts_has_as_many_parameters(bench):
    token, attention = (bench.execute(Trial("olmoe", "verses", name)) for name in ("token", "attention"))
    assert sum(map(len, attention["experts"])) < 0.7 * sum(map(len, token["experts"]))
    assert attention["trained_parameters"] == pytest.approx(token["trained_parameters"], rel=0.01)
    same = bench.execute(Trial("olmoe", "verses", "attention"), [{**token, "experts": attention["experts"]}])
    assert same["loss"] == attention["loss"]


def test_experts_that_no_token_reaches_are_not_moved(scores):
    for path, moved in scores["verses"].tables["moved"].items():
        assert torch.equal(moved > 0, scores["verses"].tables["gradnorm"][path] > 0)


def test_changes_are_paired_by_cell_and_seed():
    cell, other = CELLS[:2]
    records = [record(cell, "token", 2.0), record(cell, "token", 4.0, seed=1), record(other, "token", 1.0)]
    records += [
        record(cell, "gradnorm", 1.0),
        record(cell, "gradnorm", 4.0, seed=1),
        record(cell, "gradnorm", 9, seed=2),
    ]
    found = Evidence(records).changes(Setting("gradnorm"), task_change)
    assert found.by_cell == {cell: pytest.approx(100 * -0.693147 / 2, rel=1e-4)} and found.trials == 2
    assert not Evidence(records).changes(Setting("gradnorm", SMALL), task_change).by_cell
    # Without all three learning rates nothing is known of a criterion's own best one.
    assert not Evidence(records).changes(Setting("gradnorm", lr=None), task_change).by_cell
    for name in ("token", "gradnorm"):
        records += [record(cell, name, 3.0, lr=lr, validation=loss) for lr, loss in ((1e-3, 0.5), (1e-2, 2.0))]
    assert Evidence(records).changes(Setting("gradnorm", lr=None), task_change).by_cell == {cell: 0.0}


def test_paired_tests():
    assert sign_flip([-1.0, -2.0, -3.0]) == 2 / 8
    assert sign_flip([1.0, -1.0]) == 1.0 and sign_flip([]) == 1.0
    assert sign_flip([-1.0] * 9) == 2 / 512
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert rank_correlation([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)


def test_tables_say_what_was_measured():
    records = []
    for cell in CELLS:
        records += [record(cell, "token", 2.0), record(cell, "gradnorm", 1.0 if cell in FRESH else 4.0, general=3.5)]
    found = choosing_page.tables(Evidence(records))
    (row,) = [line.strip("| ").split(" | ") for line in found["comparison"].splitlines()[2:]]
    assert row[:6] == ["gradient norm", "as p 0.2", "0.003", "-69.3 ± 0.0", "9 of 9", "-19.8 ± 68.9"]
    assert row[7:] == ["+0.500 ± 0.000", "+0.500 ± 0.000", "task loss: 0.02", "14"]  # 5 tests, each with p of 2 / 512
    assert (
        "| gradient norm | as p 0.2 | task loss, % | -69.3 ± 0.0 | -69.3 | -69.3 | 9 of 9 | 0.004 | 0.020 | 9 |"
        in found["tests"]
    )
    assert "| in all |" in found["progress"] and found["cost"].count("\n") == 3


def test_what_limits_is_measured_against_all_parameters():
    cell, rows = CELLS[0], []
    rows += [record(cell, "base", 5.0, top_p=0.0, lr=0.0), record(cell, "full", 1.0, top_p=0.0, lr=3e-4)]
    rows += [record(cell, "full", 0.5, top_p=0.0, lr=1e-3, validation=2.0)]
    rows += [record(cell, "token", 3.0), record(cell, "token", 2.0, lr=1e-3, validation=0.5)]
    rows += [record(cell, "token", 1.5, lr=1e-2), record(cell, "token", 2.6, top_p=0.4)]
    rows += [record(cell, "all", 1.4, top_p=0.0, lr=lr) for lr in (3e-4, 1e-3)]
    assert not choosing_page.limits(Evidence(rows))
    rows += [record(cell, "token", 1.0, steps=300)]
    line = choosing_page.limits(Evidence(rows)).splitlines()[2]
    assert line == f"| {cell.base} | {cell.task} | 50 | 75 | 60 | 100 | 90 |"
    assert Evidence(rows).seeds(cell, "token", USUAL, "layer", SAME_LR)[0]["rest"] == 3.0


def test_the_page_shows_the_committed_results():
    found = choosing_page.tables(Evidence(choosing_page.load()))
    page = (ROOT / "docs" / "criteria.md").read_text()
    assert reporting.BLOCK.search(page)
    assert reporting.fill_tables(page, found) == page
    for figure in re.findall(r"\(figures/(\w+)\.svg\)", page):
        assert (ROOT / "docs" / "figures" / f"{figure}.svg").exists()
