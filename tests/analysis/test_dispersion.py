"""Dispersion and overlap: the known numbers of the golden routing, and invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_esft import score_experts
from peft_esft.analysis import dispersion, overlap

import golden
from families import tiny_model
from oracle import random_tokens


KNOWN_CHOICES = {
    "intent": {0.2: 4.77, 0.5: 15.1, 0.9: 44.2},
    "translation": {0.2: 3.19, 0.5: 10.1, 0.9: 38.2},
}
KNOWN_GATE_MASS = {
    "intent": {0.1: 2.0, 0.2: 3.6, 0.5: 12.0, 0.9: 40.3},
    "translation": {0.1: 1.2, 0.2: 2.1, 0.5: 6.3, 0.9: 34.5},
}
score_rows = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any)


@pytest.fixture(scope="module")
def scores():
    return {task: golden.load_scores(task) for task in golden.TASKS}


@pytest.mark.parametrize("task", golden.TASKS)
@pytest.mark.parametrize(("metric", "known"), [("token", KNOWN_CHOICES), ("gate", KNOWN_GATE_MASS)])
def test_experts_for_a_share_of_the_golden_routing(scores, task, metric, known):
    result = dispersion(scores[task], metric=metric)
    assert len(result.layers) == 26
    for share, experts in known[task].items():
        assert result.experts_for(share) == pytest.approx(experts, abs=0.051)
    assert [result.uniform_experts_for(share) for share in (0.2, 0.5, 0.9)] == pytest.approx([12.8, 32, 57.6])
    assert f"({min(layer.experts_for(0.2) for layer in result.layers.values())} to" in str(result)


def test_real_routing_lies_between_one_expert_and_uniform(scores):
    intent, translation = (dispersion(scores[task]) for task in golden.TASKS)
    assert 0 < intent.gini < translation.gini < 1 - 1 / 64
    assert 0 < translation.entropy < intent.entropy < math.log(64)
    assert intent.top_share(6) < translation.top_share(6) < 1


def test_tasks_of_the_golden_routing_share_few_experts(scores):
    result = overlap(scores)
    assert result.mean_shared()[0, 1] == pytest.approx(0.92, abs=0.005)
    assert result.chance == pytest.approx(0.56, abs=0.005)
    assert all(5.0 <= halves <= 5.8 for halves in result.mean_halves().tolist())
    assert result.mean_shared().diag().tolist() == [6, 6]
    assert result.mean_jaccard()[0, 1] < 0.15
    assert "0.92" in str(result) and "by chance: 0.56" in str(result)


def test_scores_without_halves_have_no_noise_floor():
    scores = score_experts(tiny_model("olmoe"), [{"input_ids": random_tokens(1, 30)}], progress=False)
    result = overlap({"one": scores, "again": scores}, metric="gate", top_k=3)
    assert result.mean_halves().isnan().all()
    assert (result.mean_shared() == 3).all() and (result.mean_jaccard() == 1).all()


@given(score_rows, st.lists(st.floats(0.01, 1), min_size=2, max_size=2))
def test_more_experts_for_a_larger_share(row, shares):
    (layer,) = dispersion({"a": row}).layers.values()
    low, high = sorted(shares)
    assert 1 <= layer.experts_for(low) <= layer.experts_for(high) <= len(row)
    assert layer.top_share(layer.experts_for(high)) >= high - 1e-8
    assert layer.top_share(layer.experts_for(high) - 1) < high
    assert layer.top_share(len(row)) == pytest.approx(1)


@given(score_rows)
def test_gini_and_entropy_stay_in_their_bounds(row):
    (layer,) = dispersion({"a": row}).layers.values()
    assert 0 <= layer.gini <= 1 - 1 / len(row) + 1e-12
    assert -1e-12 <= layer.entropy <= math.log(len(row)) + 1e-9


@given(score_rows, st.randoms())
def test_the_numbers_do_not_depend_on_the_experts_ids(row, random):
    order = random.sample(range(len(row)), len(row))
    (layer,) = dispersion({"a": row}).layers.values()
    (permuted,) = dispersion({"a": [row[i] for i in order]}).layers.values()
    torch.testing.assert_close(layer.shares, permuted.shares)
    assert [row[i] for i in layer.expert_ids] == [row[order[i]] for i in permuted.expert_ids]
    assert permuted.gini == pytest.approx(layer.gini)


def test_gini_of_known_rows():
    assert dispersion({"a": [1, 1, 1, 1]}).gini == 0
    assert dispersion({"a": [0, 0, 7, 0]}).gini == pytest.approx(0.75)
    assert dispersion({"a": [0, 0, 7, 0]}).entropy == 0
    assert dispersion({"a": [1, 3]}).gini == pytest.approx(0.25)


def tables(num_experts):
    row = st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts).filter(any)
    return st.lists(row, min_size=1, max_size=4)


@given(tables(6), st.integers(1, 6))
def test_overlap_is_symmetric_and_bounded(rows, top_k):
    tasks = {str(number): golden.scores_of_counts({"a": row}) for number, row in enumerate(rows)}
    result = overlap(tasks, top_k=top_k)
    assert torch.equal(result.shared, result.shared.transpose(1, 2))
    assert torch.equal(result.jaccard, result.jaccard.transpose(1, 2))
    assert ((result.jaccard >= 0) & (result.jaccard <= 1)).all()
    assert (result.shared <= top_k).all() and (result.shared[0].diag() == top_k).all()
    assert (result.jaccard[0].diag() == 1).all()


def test_what_cannot_be_compared_is_refused(scores):
    with pytest.raises(ValueError, match="no tasks"):
        overlap({})
    with pytest.raises(ValueError, match="different models"):
        overlap({"intent": scores["intent"], "other": golden.scores_of_counts({"a": [1, 2]})})
    one, other = (
        golden.scores_of_counts({"a": [1, 2], "b": [0, 0]}),
        golden.scores_of_counts({"a": [0, 0], "b": [1, 1]}),
    )
    with pytest.raises(ValueError, match="reached by all"):
        overlap({"one": one, "other": other})
    with pytest.raises(ValueError, match="share is 1\\.5"):
        dispersion({"a": [1, 2]}).experts_for(1.5)
    with pytest.raises(ValueError, match="all 0"):
        dispersion({"a": [0, 0]})
    with pytest.raises(ValueError, match="scores of a"):
        dispersion({"a": [-1.0, 2.0]})
    with pytest.raises(ValueError, match="metric is 'mean'"):
        dispersion({"a": [1]}, metric="mean")
