"""Scores over experts in few bits are those over a dense base with the same numbers, and choose for any base."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_foreign_experts import aligned, parametrized

from peft_esft import (
    ESFTConfig,
    ExpertScores,
    adopt_quantized_experts,
    quantize_experts,
    score_experts,
    select_experts,
)
from peft_esft.scoring.memory_estimate import Setup

from families import tiny_model
from oracle import deltas_of, random_tokens, task_loss
from stored_bases import TYPICAL, dense_twin, quantised


def scored(model: torch.nn.Module) -> ExpertScores:
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    batches = [{"input_ids": random_tokens(3, 12, seed), "attention_mask": mask} for seed in range(3)]
    return score_experts(model, batches, progress=False)


def counts(scores: ExpertScores) -> ExpertScores:
    """Without the sizes of the model, of which its form is one."""
    return replace(scores, sizes=None)


@pytest.mark.parametrize("family", TYPICAL)
@pytest.mark.parametrize(("bits", "form"), [(4, "nf4"), (4, "nf4 double"), (8, "int8")])
def test_scores_equal_those_over_the_dequantised_base(family: str, bits: int, form: str, tmp_path: Path) -> None:
    plain = tiny_model(family, torch.bfloat16)
    base = quantised(copy.deepcopy(plain), bits, "nf4" if bits == 8 else form)
    own, wanted = scored(base), scored(dense_twin(plain, base))
    assert counts(own) == counts(wanted)
    if len(own.containers) > 1:  # the routing of the first layer does not depend on its experts
        assert counts(own) != counts(scored(plain))
    own.save(tmp_path / "scores.json")
    assert ExpertScores.load(tmp_path / "scores.json").sizes.stored_as == form


def test_scores_of_adopted_experts_equal_those_over_their_values() -> None:
    plain = aligned()
    adopted = adopt_quantized_experts(parametrized(copy.deepcopy(plain), compress_statistics=True))
    own = scored(adopted)
    assert counts(own) == counts(scored(dense_twin(plain, adopted))) and own.sizes.stored_as == "nf4"


def test_scores_of_a_plain_base_choose_for_a_quantised_one_and_the_adapter_fits_both(tmp_path: Path) -> None:
    """No warning: all of them are errors here. What is chosen depends on the scores alone."""
    plain = tiny_model("olmoe", torch.bfloat16)
    base = quantize_experts(copy.deepcopy(plain), bits=4)
    config = ESFTConfig.from_scores(scored(plain), top_p=0.5)
    wrapped = get_peft_model(base, config)
    assert config.target_experts == select_experts(scored(plain), top_p=0.5)
    task_loss(wrapped(input_ids=random_tokens())[0]).backward()
    assert all(delta.grad is not None for delta in deltas_of(wrapped).values())
    wrapped.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(plain, tmp_path / "adapter")
    reused = ESFTConfig.from_scores(scored(quantize_experts(tiny_model("olmoe"), bits=8)), top_p=0.5)
    get_peft_model(tiny_model("olmoe"), reused)


def test_a_budget_of_memory_counts_the_base_in_the_form_that_was_scored() -> None:
    plain = scored(tiny_model("olmoe", torch.bfloat16))
    own = replace(plain, sizes=replace(plain.sizes, stored_as="nf4"))
    chosen = {}
    double = replace(plain, sizes=replace(plain.sizes, stored_as="nf4 double"))
    for scores, form in ((plain, "bf16"), (own, "nf4"), (double, "nf4")):
        chosen[form] = select_experts(scores, budget="7.2MB")
        assert chosen[form] == select_experts(plain, budget=Setup.parse("7.2MB", base=form))
        assert ESFTConfig.from_scores(scores, budget="7.2MB").target_experts == chosen[form]
    assert sum(map(len, chosen["bf16"].values())) < sum(map(len, chosen["nf4"].values()))
