"""The optimizers of bitsandbytes and torchao take ESFT's deltas as they are; a step can be part of the backward."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers.training_args import OptimizerNames

from peft_esft import quantize_experts
from peft_esft.scoring.memory_estimate import EIGHT_BIT_MOMENTS, OPTIMIZERS

from families import tiny_model
from oracle import config_for, random_tokens


bnb = pytest.importorskip("bitsandbytes.optim")
CLASSES = {
    "adamw_8bit": bnb.AdamW8bit,
    "paged_adamw_8bit": bnb.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.PagedAdamW32bit,
}
# On the CPU there are no pages to leave; bitsandbytes says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")


def trained_with(optimizer_class, rank, bits):
    """Losses of steps on one batch; the frozen weights, before and after; the optimizer."""
    torch.manual_seed(0)
    base = tiny_model("olmoe")
    if bits is not None:
        base = quantize_experts(base, bits=bits)
    model = get_peft_model(base, config_for(base, [1, 3, 6], rank=rank)).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = random_tokens(4, 16)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    same = all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    return losses, same, optimizer


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", CLASSES)
def test_training_learns_what_torchs_adamw_does(name, rank, bits):
    assert name in OPTIMIZERS and name in set(OptimizerNames)
    losses, same, _ = trained_with(CLASSES[name], rank, bits)
    expected, *_ = trained_with(torch.optim.AdamW, rank, bits)
    assert same
    assert losses[0] == expected[0]
    fallen = expected[0] - expected[-1]
    assert fallen > 0.05
    assert losses[-1] == pytest.approx(expected[-1], abs=0.1 * fallen)


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWFp8"])
def test_torchaos_optimizers_learn_what_torchs_adamw_does(name, bits):
    optim = pytest.importorskip("torchao.optim", reason="torchao is no dependency: pip install torchao")
    losses, same, _ = trained_with(getattr(optim, name), None, bits)
    expected, *_ = trained_with(torch.optim.AdamW, None, bits)
    assert same
    assert losses[-1] == pytest.approx(expected[-1], abs=0.01 * (expected[0] - expected[-1]))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("rank", [None, 4])
def test_steps_in_the_backward_pass_are_those_after_it_and_keep_few_gradients(rank, bits):
    """As docs/scaling.md shows it."""
    results, most = [], 0
    for is_in_backward in (False, True):
        torch.manual_seed(0)
        base = tiny_model("olmoe")
        base = base if bits is None else quantize_experts(base, bits=bits)
        model = get_peft_model(base, config_for(base, [1, 3, 6], rank=rank)).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2, fused=True) for p in trained}

        def step(parameter, trained=trained, optimizers=optimizers):
            nonlocal most
            most = max(most, sum(p.grad is not None for p in trained))
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        if is_in_backward:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(step)
        ids = random_tokens(4, 16)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            if not is_in_backward:
                for optimizer in optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in trained])
    assert all(map(torch.equal, *results))
    assert most <= len(results[0]) / 2  # those of one of two layers


def test_moments_take_what_is_estimated():
    *_, optimizer = trained_with(bnb.AdamW8bit, None, None)
    large = [(p, state) for p, state in optimizer.state.items() if p.numel() >= 4096]  # smaller ones stay in fp32
    assert large
    for parameter, state in large:
        held = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
        assert held / parameter.numel() == pytest.approx(EIGHT_BIT_MOMENTS, rel=0.01)
