"""Tests that what is held belongs to one hold, and to the adapters as they are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import Context

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, hotswap_adapter

from families import tiny_model
from oracle import random_tokens


TOKENS = random_tokens(2, 6)
NAMES = ["a", "b"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("olmoe"), ESFTConfig(target_experts={1: [1, 5]}, init_weights=False), "a")
    model.add_adapter("b", ESFTConfig(target_experts={1: [5, 2, 6]}, init_weights=False))
    return model.eval()


@torch.no_grad()
def outputs(model, names=None):
    return model(input_ids=TOKENS, adapter_names=names).logits


@torch.no_grad()
def change_weights(model):
    for name, parameter in model.named_parameters():
        if ".esft_" in name:
            parameter.mul_(3)


def scale(model, folder):
    model.base_model.set_scale("a", 3.0)


def replace(model, folder):
    model.delete_adapter("b")
    model.add_adapter("b", ESFTConfig(target_experts={1: [5, 2, 6]}, init_weights=False))


def hotswap(model, folder):
    hotswap_adapter(model, folder / "b", adapter_name="a")


@pytest.mark.parametrize("operation", [scale, replace, hotswap])
@pytest.mark.parametrize("names", [None, NAMES], ids=["active", "mixed"])
def test_operations_on_adapters_take_effect_within_a_hold(model, names, operation, tmp_path):
    model.save_pretrained(tmp_path)
    with model.base_model.hold():
        before = outputs(model, names)
        operation(model, tmp_path)
        model.eval()
        within = outputs(model, names)
    assert torch.equal(within, outputs(model, names))
    assert torch.equal(within, before) is (names is None and operation is replace)


@pytest.mark.parametrize("names", [None, NAMES], ids=["active", "mixed"])
def test_a_hold_does_not_take_over_the_rows_of_another_threads_hold(model, names):
    def hold():
        with model.base_model.hold():
            return outputs(model, names)

    with model.base_model.hold():
        old = outputs(model, names)
        change_weights(model)
        with ThreadPoolExecutor(1) as executor:
            new = executor.submit(hold).result()
    assert torch.equal(new, outputs(model, names)) and not torch.equal(new, old)


@pytest.mark.parametrize("names", [None, NAMES], ids=["active", "mixed"])
def test_generators_may_end_their_holds_in_any_order(model, names):
    def stream():
        with model.base_model.hold():
            while True:
                yield outputs(model, names)

    first, second = stream(), stream()
    assert torch.equal(next(first), next(second))
    first.close()
    next(second)
    second.close()
    change_weights(model)
    assert torch.equal(outputs(model, names), Context().run(outputs, model, names))
