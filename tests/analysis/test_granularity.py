"""Groups of experts: the golden routing, and invariants."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_esft import find_experts
from peft_esft.analysis import (
    co_occurrence,
    count_pairs,
    granularity,
    group_experts,
    group_shares,
    random_groups,
    select_groups,
    similarity,
)

import golden
from families import tiny_model
from oracle import random_tokens
from recorded import RecordedRouting


@pytest.fixture(scope="module")
def report():
    scores = {task: golden.load_scores(task) for task in golden.TASKS}
    return granularity(scores, golden.load_co_occurrence())


def test_coarser_groups_of_the_golden_routing_train_more(report):
    """Of the paper's four tasks these two are the more concentrated; all four gave 4.7, 6.6, 8.9, 12.5."""
    assert [point.size for point in report.points] == [1, 2, 4, 8]
    experts = [point.mean_experts for point in report.points]
    assert experts == pytest.approx([3.98, 5.04, 6.38, 8.31], abs=0.01)
    random = [point.mean_random_experts for point in report.points]
    assert random == pytest.approx([3.98, 6.2, 8.9, 13.2], abs=0.25)
    assert all(bound < unbound for bound, unbound in zip(experts[1:], random[1:], strict=True))
    for point in report.points:
        for task, count in point.experts.items():
            assert point.share[task] == pytest.approx(count / 64)
    assert "13.2     13.0%" in str(report)


def test_golden_groups_are_a_partition_and_a_selection_takes_whole_groups():
    counts = golden.load_co_occurrence()
    groups = group_experts(counts, 4)
    selection = select_groups(golden.load_scores("intent"), groups, top_p=0.2)
    for path, rows in groups.items():
        assert sorted(np.concatenate(rows).tolist()) == list(range(64))
        chosen = set(selection[path])
        assert all(chosen >= set(row) or not chosen & set(row) for row in rows)


matrices = st.integers(1, 3).flatmap(
    lambda halves: st.lists(
        st.lists(st.integers(0, 2 * halves - 1), min_size=2, max_size=2, unique=True), min_size=1, max_size=30
    ).map(lambda rows: count_pairs(torch.tensor(rows), 2 * halves))
)


@given(matrices, st.integers(0, 5))
def test_groups_are_a_partition(counts, seed):
    experts = counts.shape[0]
    for size in (1, 2, experts):
        for groups in (group_experts({"a": counts}, size), random_groups({"a": experts}, size, seed=seed)):
            assert {len(group) for group in groups["a"]} == {size}
            assert sorted(chain.from_iterable(groups["a"])) == list(range(experts))


@given(st.integers(0, 1000))
def test_groups_follow_a_renumbering_of_the_experts(seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.rand(8, 8, generator=generator, dtype=torch.float64)
    counts = counts + counts.T
    order = torch.randperm(8, generator=generator)
    renumbered = group_experts({"a": counts[order][:, order]}, 4)["a"]
    as_before = [sorted(order[group].tolist()) for group in renumbered]
    assert as_before == [sorted(group) for group in group_experts({"a": counts}, 4)["a"]]


def test_the_most_similar_pair_is_bound_first():
    counts = count_pairs(torch.tensor([[0, 3], [0, 3], [1, 2], [1, 2], [0, 1]]), 4)
    assert counts.tolist() == [[3, 1, 0, 2], [1, 3, 2, 0], [0, 2, 2, 0], [2, 0, 0, 2]]
    assert similarity(counts).argmax().item() in (0, 5, 10, 15)
    assert group_experts({"a": counts}, 2)["a"] == [[0, 3], [1, 2]]
    shares = group_shares({"a": [3, 3, 2, 2]}, {"a": [[0, 3], [1, 2]]})
    assert shares["a"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "longcat_flash"])
def test_co_occurrence_equals_a_record_of_every_token(family):
    model = tiny_model(family)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0
    batches = [{"input_ids": random_tokens(3, 10, seed=seed), "attention_mask": mask} for seed in range(2)]
    recorded = RecordedRouting(model)
    counts = co_occurrence(model, batches)
    counted = mask.reshape(-1).bool().tolist()
    for path, calls in recorded.calls.items():
        expected = torch.zeros(8, 8, dtype=torch.int64)
        for index, weights in calls:
            for row, gates, counts_too in zip(index, weights, counted, strict=True):
                chosen = {expert for expert, gate in zip(row, gates, strict=True) if expert < 8 and gate > 0}
                for one in chosen if counts_too else ():
                    for other in chosen:
                        expected[one, other] += 1
        assert torch.equal(counts[path], expected)


def test_co_occurrence_stops_and_leaves_no_trace():
    model = tiny_model("olmoe").train()
    counts = co_occurrence(model, ({"input_ids": random_tokens(2, 8, seed=seed)} for seed in range(9)), max_tokens=21)
    assert all(matrix.diag().sum() == 2 * 21 for matrix in counts.values())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no experts module"):
        co_occurrence(torch.nn.Linear(2, 2), [])


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="8 experts, which cannot be divided into groups of 3"):
        random_groups(dict.fromkeys(find_experts(tiny_model("olmoe")), 8), 3, seed=0)
    with pytest.raises(ValueError, match="do not hold each"):
        group_shares({"a": [1, 2, 3]}, {"a": [[0, 1]]})
