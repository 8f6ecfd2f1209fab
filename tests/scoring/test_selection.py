"""Selection: the golden data, and properties of every selection."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_esft import ESFTConfig, random_experts, select_experts
from peft_esft.scoring.memory_estimate import Setup, estimate
from peft_esft.scoring.model_sizes import ModelSizes
from peft_esft.scoring.scores import ContainerScores, ExpertScores
from peft_esft.scoring.selection import top_p_for_memory

from golden import FOLDER as GOLDEN


scores_rows = st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any)


@pytest.mark.parametrize("task", ["intent", "translation"])
def test_released_selection_is_reproduced_order_included(task):
    layers = json.loads((GOLDEN / f"{task}.json").read_text())["layers"]
    scores = {layer: record["token_score_4dp"] for layer, record in layers.items()}
    released = {layer: record["released_selection"] for layer, record in layers.items()}
    assert len(released) == 26
    assert select_experts(scores, top_p=0.2) == released


@given(scores_rows, st.integers(1, 100))
def test_selection_reaches_top_p_and_no_smaller_one_does(row, percent):
    scores = [value / sum(row) for value in row]
    chosen = select_experts({"layer": scores}, top_p=percent / 100)["layer"]
    total = sum(scores[expert] for expert in chosen)
    assert len(set(chosen)) == len(chosen) >= 1
    assert total >= percent / 100 - 1e-6
    assert total - scores[chosen[-1]] < percent / 100
    largest = sorted(scores, reverse=True)[: len(chosen)]
    assert sum(largest) == pytest.approx(total)


@given(scores_rows, st.integers(1, 99), st.integers(1, 99))
def test_selection_grows_with_top_p(row, first, second):
    scores = {"layer": [value / sum(row) for value in row]}
    small, large = (select_experts(scores, top_p=p / 100)["layer"] for p in sorted((first, second)))
    assert large[: len(small)] == small


@given(scores_rows.filter(lambda row: len(set(row)) == len(row)), st.randoms())
def test_selection_follows_a_renumbering_of_the_experts(row, random):
    scores = [value / sum(row) for value in row]
    order = list(range(len(row)))
    random.shuffle(order)
    renumbered = select_experts({"layer": [scores[expert] for expert in order]}, top_p=0.5)["layer"]
    assert [order[expert] for expert in renumbered] == select_experts({"layer": scores}, top_p=0.5)["layer"]


def test_recorded_scores_are_read_by_the_metric_and_sized_by_their_experts():
    def scored(chosen, gates, size):
        return ContainerScores(1, 10, 1, chosen, gates, chosen, gates, parameters_per_expert=size)

    containers = {"small": scored([6, 3, 1], [1.0, 2.0, 1.0], 2), "large": scored([8, 1, 1], [1.0, 1.0, 8.0], 10)}
    scores = ExpertScores(containers, num_tokens=10, num_samples=1, averaging="token")
    assert select_experts(scores, top_p=0.5) == {"small": [0], "large": [0]}
    assert select_experts(scores, top_p=0.3, metric="gate") == {"small": [1, 0], "large": [2]}
    assert select_experts(scores, top_p=0.75, metric="gate_share") == {"small": [1, 0], "large": [2]}
    # Half of 36 parameters: one large expert and all small ones; a second large one would be too much.
    assert select_experts(scores, budget=0.5) == {"small": [0, 1, 2], "large": [0]}
    with pytest.raises(ValueError, match="min_experts requires 2 experts"):
        select_experts(scores, budget=0.3)


@pytest.mark.parametrize("number", range(1, 101))
def test_scores_that_add_up_on_paper_add_up(number):
    """Also where fp32 or plain binary sums would miss the threshold by a rounding."""
    assert select_experts({"layer": [0.01] * 100}, top_p=number / 100) == {"layer": list(range(number))}


def test_scores_that_sum_to_top_p_are_enough():
    assert select_experts({"layer": [0.3, 0.2]}, top_p=0.5) == {"layer": [0, 1]}


@pytest.mark.parametrize("way", ["top_p", "budget"])
def test_a_share_of_one_takes_all(way):
    assert select_experts({"layer": [0.25, 0.25, 0.5]}, **{way: 1}) == {"layer": [2, 0, 1]}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ([0.0, 0.0], {}, "no token"),
        ([0.1, 0.1], {"top_p": 0.5}, "sum to less"),
        ([0.5, 0.5], {"metric": "gate"}, "sum to 1 or more"),
    ],
)
def test_warnings_point_at_the_call(row, settings, message):
    with pytest.warns(UserWarning, match=message) as caught:
        select_experts({"layer": row}, **settings)
    assert [warning.filename for warning in caught] == [__file__]


def test_equal_scores_are_resolved_by_id():
    assert select_experts({"layer": [0.1, 0.3, 0.3, 0.3]}, top_p=0.6) == {"layer": [1, 2]}


def test_containers_that_no_token_reached_are_left_out():
    with pytest.warns(UserWarning, match="reached 1 of 2 experts modules, for example image"):
        assert select_experts({"image": [0.0, 0.0], "text": [0.5, 0.5]}, top_p=0.2) == {"text": [0]}


def test_scores_below_top_p_select_all_and_warn():
    with pytest.warns(
        UserWarning, match=r"1 of 2 experts modules sum to less than top_p=0.5 \(for example 0.300 in a\)"
    ):
        selection = select_experts({"a": [0.1, 0.2], "b": [0.5, 0.5]}, top_p=0.5)
    assert selection == {"a": [1, 0], "b": [0]}


def test_a_fixed_number_for_every_container():
    assert select_experts({"a": [0.1, 0.6, 0.3], "b": [0.9, 0.1]}, top_k=2) == {"a": [1, 2], "b": [0, 1]}
    assert select_experts({"a": [0.1, 0.6, 0.3], "b": [0.9, 0.1]}, top_k=3) == {"a": [1, 2, 0], "b": [0, 1]}


def test_bounds_hold_whatever_the_scores_say():
    scores = {"steep": [0.9, 0.06, 0.04], "flat": [0.4, 0.3, 0.3]}
    assert select_experts(scores, top_p=0.7, min_experts=2) == {"steep": [0, 1], "flat": [0, 1]}
    assert select_experts(scores, top_p=0.8, max_experts=2) == {"steep": [0], "flat": [0, 1]}
    assert select_experts(scores, top_k=3, max_experts=1) == {"steep": [0], "flat": [0]}


@given(st.lists(scores_rows, min_size=1, max_size=5), st.integers(1, 100), st.integers(1, 3))
def test_a_budget_is_kept_and_spent_on_the_highest_scores(rows, percent, least):
    scores = {f"layer {number}": [value / sum(row) for value in row] for number, row in enumerate(rows)}
    total = sum(map(len, rows))
    if sum(min(least, len(row)) for row in rows) > percent / 100 * total * (1 + 1e-9):
        with pytest.raises(ValueError, match="is too small"):
            select_experts(scores, budget=percent / 100, min_experts=least)
        return
    selection = select_experts(scores, budget=percent / 100, min_experts=least)
    chosen = sum(map(len, selection.values()))
    assert chosen == int(percent / 100 * total * (1 + 1e-9))
    # Beyond the minimum, no expert that was left out scores more than one that was taken.
    taken = [scores[path][e] for path, ids in selection.items() for e in ids[least:]]
    left = [score for path, row in scores.items() for e, score in enumerate(row) if e not in selection[path]]
    assert not taken or not left or min(taken) >= max(left)


def scored_model(rows, size=1_000):
    """Scores of a model with a container for each row, whose experts have `size` weights."""
    containers = {
        f"layer {number}": ContainerScores(1, 10, 1, [1] * len(row), None, [v / sum(row) for v in row], None, size)
        for number, row in enumerate(rows)
    }
    experts = tuple(len(row) * size for row in rows)
    total = sum(experts) + 500 * (len(rows) + 1)
    units = tuple(own + 500 for own in experts)
    sizes = ModelSizes(total, units, experts, size, 60, max(map(len, rows)), 1, 20, 16, 30, 40, 10)
    return ExpertScores(containers, num_tokens=10, num_samples=1, sizes=sizes)


def chosen_share(scores, selection):
    return sum(map(len, selection.values())) * 1_000 / scores.sizes.experts


@settings(deadline=None)
@given(
    st.lists(scores_rows, min_size=1, max_size=4),
    st.lists(st.integers(10_000, 2_000_000), min_size=2, max_size=2),
    st.sampled_from(["bf16", "int8", "nf4"]),
    st.sampled_from([None, 2]),
    st.sampled_from(["adamw_torch", "adamw_8bit"]),
    st.integers(1, 3),
)
def test_what_is_chosen_for_memory_fits_and_the_next_larger_choice_does_not(rows, budgets, base, rank, optim, least):
    scores = scored_model(rows)
    chosen = []
    for memory in sorted(budgets):
        setup = Setup(memory=memory, tokens=4, base=base, rank=rank, optim=optim)
        most = {path: c.num_experts for path, c in scores.containers.items()}
        try:
            selection = select_experts(scores, budget=setup, min_experts=least)
        except ValueError as refused:
            error = str(refused)
            fewest = sum(min(least, count) for count in most.values()) * 1_000 / scores.sizes.experts
            assert "does not fit a budget of" in error and "These settings would fit" in error
            assert not estimate(scores.sizes, replace(setup, share=fewest)).fits
            chosen.append({path: [] for path in most})
            continue
        top_p = top_p_for_memory(scores, setup, min_experts=least)
        assert select_experts(scores, top_p=top_p, min_experts=least) == selection
        assert estimate(scores.sizes, replace(setup, share=chosen_share(scores, selection))).fits
        chosen.append(selection)
        shares = sorted(value for row in scores.token().values() for value in ranked(row).cumsum(0).tolist())
        larger = [p for p in shares if p > top_p + 1e-9]
        if larger and larger[0] <= 1:
            more = select_experts(scores, top_p=larger[0], min_experts=least)
            if more != selection:
                assert not estimate(scores.sizes, replace(setup, share=chosen_share(scores, more))).fits
    smaller, larger_choice = chosen
    assert all(larger_choice[path][: len(ids)] == ids for path, ids in smaller.items())


def ranked(row):
    return row.sort(descending=True).values


LARGE = {"rows": [[0.4, 0.3, 0.2, 0.1]] * 2, "size": 100_000_000}


def test_memory_as_text_is_that_of_one_or_several_gpus():
    scores = scored_model(**LARGE)
    assert select_experts(scores, budget="12GB") == {"layer 0": [0, 1], "layer 1": [0, 1]}
    assert select_experts(scores, budget="12GB") == select_experts(scores, budget=Setup(memory=12e9))
    assert select_experts(scores, budget="80GB") == {"layer 0": [0, 1, 2, 3], "layer 1": [0, 1, 2, 3]}
    assert select_experts(scores, budget="80GB", max_experts=1) == {"layer 0": [0], "layer 1": [0]}
    assert select_experts(scores, budget="2x12GB") == select_experts(scores, budget="80GB")  # each has half of it
    copies = Setup(gpus=2, memory=12e9, engine="DDP")
    assert select_experts(scores, budget=copies) == {"layer 0": [0], "layer 1": [0]}
    message = (
        r"the model does not fit a budget of 5GB, .* takes 5.6 GB, of which the base in bf16 takes 1.6 GB.* nf4 base"
    )
    with pytest.raises(ValueError, match=message):
        select_experts(scores, budget="5GB")


@pytest.mark.parametrize("kind", ["mapping", "without sizes"])
def test_a_budget_of_memory_needs_the_models_sizes(kind):
    scores = replace(scored_model([[0.5, 0.5]]), sizes=None) if kind == "without sizes" else {"layer": [0.5, 0.5]}
    with pytest.raises(ValueError, match="a budget of 24GB needs the sizes of the model"):
        select_experts(scores, budget="24GB")


def test_a_budget_of_memory_is_one_way_of_choosing():
    scores = scored_model([[0.5, 0.5]])
    with pytest.raises(ValueError, match="different ways of choosing"):
        select_experts(scores, budget="24GB", top_p=0.2)
    with pytest.raises(ValueError, match="'24' is not an amount of GPU memory"):
        select_experts(scores, budget="24")


def test_a_config_fills_memory_with_deltas_of_its_rank():
    scores = scored_model(**LARGE)
    full, low = (ESFTConfig.from_scores(scores, budget="12GB", rank=rank) for rank in (None, 1))
    assert [sum(map(len, own.target_experts.values())) for own in (full, low)] == [4, 8]
    assert full.selection["budget"] == "12GB" and full.selection["top_p"] == pytest.approx(0.7)
    assert low.rank == 1 and low.selection["top_p"] == 1
    with pytest.raises(ValueError, match="for rank None, but the config has rank=2"):
        ESFTConfig.from_scores(scores, budget=Setup(memory=12e9), rank=2)
    with pytest.raises(ValueError, match="counts experts only, not train_shared_experts, train_non_expert_modules"):
        ESFTConfig.specialise(scores, budget="12GB")


def test_random_experts_are_as_many_and_reproducible():
    selection = {"a": [3, 1], "b": [0]}
    sizes = {"a": 8, "b": 4}
    first = random_experts(selection, sizes, seed=1)
    assert first == random_experts(selection, sizes, seed=1)
    assert {path: len(set(ids)) for path, ids in first.items()} == {"a": 2, "b": 1}
    assert all(0 <= expert < sizes[path] for path, ids in first.items() for expert in ids)
    assert len({str(random_experts(selection, sizes, seed=seed)) for seed in range(20)}) > 10


def test_renormalised_gates_are_pointed_out_with_the_numbers():
    scores = {"a": [0.05, 0.15, 0.8], "b": [0.4, 0.3, 0.3]}
    with pytest.warns(UserWarning, match=r"gates of 2 of 2 experts modules sum to 1 or more.*selects 1\.0 experts"):
        select_experts(scores, metric="gate")


@pytest.mark.parametrize(
    ("scores", "settings", "message"),
    [
        ({"a": [0.5, 0.5]}, {"top_p": 0.2, "top_k": 3}, "'top_p': 0.2, 'top_k': 3} are different ways of choosing"),
        ({"a": [0.5, 0.5]}, {"budget": 0.2, "top_k": 3}, "'top_k': 3, 'budget': 0.2} are different ways of choosing"),
        ({"a": [0.5, 0.5]}, {"budget": 2}, "budget is 2"),
        ({"a": [0.5, 0.5]}, {"budget": 0.4}, "min_experts requires 1 experts"),
        ({"a": [0.5, 0.5]}, {"top_k": 0}, "top_k is 0"),
        ({"a": [0.5, 0.5]}, {"min_experts": 0}, "min_experts is 0"),
        ({"a": [0.5, 0.5]}, {"max_experts": 0}, "max_experts is 0"),
        ({"a": [0.5, 0.5]}, {"min_experts": 3, "max_experts": 2}, "max_experts is 2, less than min_experts, 3"),
        ({"a": [0.5, 0.5]}, {"top_p": 0.0}, "top_p is 0.0"),
        ({"a": [0.5, 0.5]}, {"top_p": 1.5}, "top_p is 1.5"),
        ({"a": [0.5, 0.5]}, {"top_p": "0.2"}, "top_p is '0.2'; expected a share"),
        ({"a": [0.5, 0.5]}, {"top_p": True}, "top_p is True"),
        ({"a": [0.5, 0.5]}, {"budget": [0.5]}, r"budget is \[0.5\]"),
        ({"a": [0.5, 0.5]}, {"top_k": 2.5}, "top_k is 2.5; expected an integer"),
        ({"a": [0.5, 0.5]}, {"max_experts": "2"}, "max_experts is '2'"),
        (
            {"a": [0.5, 0.5]},
            {"metric": "tokens"},
            r"metric is 'tokens'; it is one of \('token', 'gate', 'gate_share'\)",
        ),
        ({"a": [0.5, float("nan")]}, {}, "scores of a"),
        ({"a": [0.5, -0.5]}, {}, "scores of a"),
        ({"a": []}, {}, "scores of a"),
        ({"a": torch.ones(2, 2)}, {}, "scores of a"),
    ],
)
def test_bad_input_is_refused(scores, settings, message):
    with pytest.raises(ValueError, match=message):
        select_experts(scores, **settings)


def test_scores_of_another_kind_are_named():
    with pytest.raises(ValueError, match=r"scores are a list; expected ExpertScores or a dict \{path: scores \[E\]\}"):
        select_experts([[0.5, 0.5]])
