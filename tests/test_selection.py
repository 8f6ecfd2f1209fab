"""Selection: the golden data, and properties of every selection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_esft import select_experts


GOLDEN = Path(__file__).parent / "data" / "deepseek_v2_lite_routing"
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


def test_equal_scores_are_resolved_by_id():
    assert select_experts({"layer": [0.1, 0.3, 0.3, 0.3]}, top_p=0.6) == {"layer": [1, 2]}


def test_scores_below_top_p_select_all_and_warn():
    with pytest.warns(UserWarning, match=r"1 of 2 containers sum to less than top_p=0.5 \(for example 0.300 in a\)"):
        selection = select_experts({"a": [0.1, 0.2], "b": [0.5, 0.5]}, top_p=0.5)
    assert selection == {"a": [1, 0], "b": [0]}


@pytest.mark.parametrize(
    ("scores", "settings", "message"),
    [
        ({"a": [0.5, 0.5]}, {"top_p": 0.0}, "top_p is 0.0"),
        ({"a": [0.5, 0.5]}, {"top_p": 1.5}, "top_p is 1.5"),
        ({"a": [0.5, 0.5]}, {"metric": "tokens"}, "metric is 'tokens'"),
        ({"a": [0.5, float("nan")]}, {}, "scores of a"),
        ({"a": [0.5, -0.5]}, {}, "scores of a"),
        ({"a": []}, {}, "scores of a"),
        ({"a": torch.ones(2, 2)}, {}, "scores of a"),
    ],
)
def test_bad_input_is_refused(scores, settings, message):
    with pytest.raises(ValueError, match=message):
        select_experts(scores, **settings)
