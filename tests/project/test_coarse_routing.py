"""Coarse models: routers that choose groups of experts, as benchmarks/paper/coarse_routing.py makes them."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, find_experts, score_experts
from peft_esft.analysis import co_occurrence, group_experts, random_groups, select_groups

import tasks
from families import tiny_model
from oracle import random_tokens
from recorded import RecordedRouting
from repository import ROOT


sys.path.insert(0, str(ROOT / "benchmarks" / "paper"))

from coarse_routing import RouterRule, coarse_routing, regroup


def test_regrouping_shares_the_mean_affinity():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    members = torch.tensor([[0, 1], [2, 3]])
    weights, index = regroup(probabilities, members, 1, RouterRule(2, False, 1.0))
    assert index.tolist() in ([[0, 1]], [[2, 3]])
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.25]]))
    weights, index = regroup(probabilities, torch.tensor([[0, 2], [1, 3]]), 1, RouterRule(2, True, 2.0))
    assert index.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_groups_of_one_change_nothing(family):
    model = tiny_model(family)
    tokens = random_tokens()
    groups = random_groups({path: c.num_experts for path, c in find_experts(model).items()}, 1, seed=0)
    with torch.no_grad():
        expected = model(tokens).logits
        with coarse_routing(model, groups):
            torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_experts_of_a_group_are_chosen_together(family):
    model = tiny_model(family)
    groups = group_experts(co_occurrence(model, [{"input_ids": random_tokens(4, 50)}]), 2)
    recorded = RecordedRouting(model)
    with torch.no_grad(), coarse_routing(model, groups):
        model(random_tokens())
    for path, calls in recorded.calls.items():
        sets = {frozenset(group) for group in groups[path]}
        for index, weights in calls:
            for row, gates in zip(index, weights, strict=True):
                assert len(row) == 2 and frozenset(row) in sets and gates[0] == gates[1]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_coarse_model_trains_through_peft():
    base = tiny_model("olmoe")
    batch = {"input_ids": random_tokens(4, 20)}
    groups = group_experts(co_occurrence(base, [batch]), 2)
    with coarse_routing(base, groups):
        scores = score_experts(base, [batch], progress=False)
        selection = select_groups(scores, groups, top_p=0.3)
        model = get_peft_model(base, ESFTConfig(target_experts=selection))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(5):
            loss = model(**batch, labels=batch["input_ids"]).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        coarse = model(**batch).logits
    assert losses[-1] < losses[0]
    for path, row in scores.token().items():
        assert all(row[one] == row[other] for one, other in groups[path])
    assert not torch.equal(model(**batch).logits, coarse)
    # Under PEFT's wrapper the routers are found too, and restored after an error.
    with coarse_routing(model, groups):
        torch.testing.assert_close(model(**batch).logits, coarse)
    with pytest.raises(IndexError), coarse_routing(model, groups):
        model(torch.tensor([[10_000]]))
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_the_input_through_the_affinities():
    model = tiny_model("olmoe", torch.float64, "eager")
    groups = random_groups(dict.fromkeys(find_experts(model), 8), 2, seed=1)
    embeddings = torch.randn(1, 3, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    with coarse_routing(model, groups):
        output = model(inputs_embeds=embeddings).logits.sum()
        (gradient,) = torch.autograd.grad(output, embeddings)
        step = 1e-5 * torch.randn_like(embeddings)
        change = model(inputs_embeds=embeddings + step).logits.sum() - output
    torch.testing.assert_close(change, (gradient * step).sum(), rtol=1e-2, atol=1e-9)


def test_groups_that_do_not_fit_are_refused():
    model = tiny_model("olmoe")
    sizes = dict.fromkeys(find_experts(model), 8)
    with (
        pytest.raises(ValueError, match=r"groups of 4 do not divide the 2 experts .* Choose a size of \[1, 2\]"),
        coarse_routing(model, random_groups(sizes, 4, seed=0)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="has 4 groups"),
        coarse_routing(model, random_groups(sizes, 2, seed=0), groups_per_token=5),
    ):
        pass
    with coarse_routing(model, random_groups(sizes, 4, seed=0), groups_per_token=1):
        scores = score_experts(model, [{"input_ids": random_tokens()}], progress=False)
    assert {c.top_k for c in scores.containers.values()} == {4}
    with pytest.raises(ValueError, match="there are groups for"), coarse_routing(model, {}):
        pass
    with (
        pytest.raises(ValueError, match="do not hold each"),
        coarse_routing(model, {path: [[0, 1]] for path in sizes}),
    ):
        pass


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_routers_of_another_rule_are_refused(family):
    model = tiny_model(family)
    groups = random_groups({path: c.num_experts for path, c in find_experts(model).items()}, 2, seed=0)
    with (
        pytest.raises(NotImplementedError, match="does not take the top_k of a softmax"),
        coarse_routing(model, groups),
    ):
        pass
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_experts_that_work_together_make_the_better_coarse_model():
    model, tokenizer = tasks.load_base()
    batches = [
        batch
        for windows in tasks.load_general().values()
        for batch in tasks.batches([("", window) for window in windows[:8]], tokenizer)
    ]
    counts = co_occurrence(model, batches)
    losses = {}
    for name, groups in (
        ("single", group_experts(counts, 1)),
        ("similar", group_experts(counts, 2)),
        ("random", random_groups(dict.fromkeys(counts, 64), 2, seed=0)),
    ):
        with coarse_routing(model, groups):
            losses[name] = sum(model(**batch).loss.item() for batch in batches) / len(batches)
    assert losses["single"] + 0.2 < losses["similar"] < losses["random"] - 0.1
