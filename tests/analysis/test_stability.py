"""Stability of a selection, on the golden routing and on the embedded model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_esft import score_experts, select_experts
from peft_esft.analysis import stability_report

import golden
from families import tiny_model
from oracle import random_tokens


@pytest.mark.parametrize("task", ["intent", "translation"])
def test_halves_of_a_real_task_mostly_agree(task):
    report = stability_report(golden.load_scores(task))
    (point,) = report.points
    assert len(point.shared) == 26
    assert 0.7 < point.agreement < 1
    assert "least agreement" in str(report)


def test_halves_are_what_scoring_them_alone_gives():
    model = tiny_model("olmoe")
    tokens = [random_tokens(3, 100, seed=seed) for seed in range(8)]
    scores = score_experts(model, [{"input_ids": batch} for batch in tokens], progress=False)
    assert [sum(half.num_tokens) for half in scores.halves] == [1200, 2400]
    rows = torch.cat(tokens)
    for number in (0, 1):
        alone = score_experts(model, [{"input_ids": rows[number::2]}], progress=False)
        for path, halves in scores.halves[-1].selected_pairs.items():
            assert halves[number] == alone.containers[path].selected_pairs
    point = stability_report(scores, top_p=0.3).points[-1]
    path = next(iter(point.shared))
    first, second = (
        set(select_experts({path: torch.tensor(half) / sum(half)}, top_p=0.3)[path])
        for half in scores.halves[-1].selected_pairs[path]
    )
    assert point.shared[path] == len(first & second)


def test_joined_runs_go_on_where_the_first_ended():
    model = tiny_model("olmoe")
    runs = [
        score_experts(model, [{"input_ids": random_tokens(2, 30, seed=seed)}], progress=False) for seed in range(2)
    ]
    joined = runs[0] + runs[1]
    assert [sum(half.num_tokens) for half in joined.halves] == [60, 120]
    path, container = next(iter(joined.containers.items()))
    assert np.sum(joined.halves[-1].selected_pairs[path], axis=0).tolist() == container.selected_pairs


def test_a_single_sample_cannot_be_compared():
    scores = score_experts(tiny_model("olmoe"), [{"input_ids": random_tokens(1, 30)}], progress=False)
    with pytest.raises(ValueError, match="no two halves"):
        stability_report(scores)
