"""What a layer remembers from one call to the next, and when it lets go of it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, ESFTLayer

from families import tiny_model
from listed import listed_model
from oracle import random_tokens


CHOICES = {"a": [1, 3], "b": [2, 5, 7], "c": [4, 0]}


def adapted(base=None, names=("a", "b", "c"), **settings):
    """A model whose adapters answer and are not trained."""
    torch.manual_seed(0)
    model = None
    for name in names:
        config = ESFTConfig(target_experts={1: CHOICES[name]}, init_weights=False, inference_mode=True, **settings)
        if model is None:
            model = get_peft_model(base or tiny_model("olmoe"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def layer_of(model):
    (layer,) = (module for module in model.modules() if isinstance(module, ESFTLayer))
    return layer


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_tokens())[0]


@pytest.mark.parametrize("build", [tiny_model, listed_model], ids=["fused", "listed"])
def test_rows_of_adapters_that_are_not_trained_are_computed_once(monkeypatch, build):
    model = adapted(build("deepseek_v2") if build is tiny_model else build())
    computed = []
    original = ESFTLayer.effective_rows
    monkeypatch.setattr(ESFTLayer, "effective_rows", lambda *args: computed.append(args[2]) or original(*args))
    num_weights = len(layer_of(model).weight_names)
    for _ in range(2):
        for active in ("a", "b", ["a", "b"]):
            model.base_model.set_adapter(active, inference_mode=True)
            logits(model)
    assert computed == [key for key in (("a",), ("b",), ("a", "b")) for _ in range(num_weights)]


def test_of_adapters_that_are_active_together_only_the_last_rows_are_kept():
    model = adapted()
    layer = layer_of(model)
    for active in ("a", ["a", "b"], "b", ["b", "c"], "c"):
        model.base_model.set_adapter(active, inference_mode=True)
        logits(model)
    assert set(layer.bank.residents) == {("a",), ("b",), ("b", "c"), ("c",)}


def test_a_frozen_adapter_s_rows_hold_as_they_are():
    model = adapted(names=["a"])
    layer = layer_of(model)
    layer.freeze_adapter("a")
    resident = layer.bank.residents[("a",)]
    logits(model)
    assert layer.bank.residents[("a",)] is resident
    assert all(rows is layer._tensors(f"esft_{name}_rows")["a"] for name, rows in resident.rows.items())
    assert all(one is other for one, other in zip(resident.sources, layer._sources(("a",)), strict=True))


def test_plans_of_batches_are_made_again_only_if_rows_moved():
    layer = layer_of(adapted())
    plan = layer.plan_mixed(["a", "__base__"])
    assert layer.plan_mixed(["a", "__base__"]) is plan
    assert layer.plan_mixed(["__base__", "a"]) is not plan
    both = layer.plan_mixed(["a", "b"])
    layer.set_scale("b", 2.0)
    assert layer.plan_mixed(["a", "b"]) is not both


def test_layers_unmerge_when_they_are_switched_off_and_not_when_they_are_switched_on():
    model = adapted(names=["a"])
    layer = layer_of(model)
    before = layer.base_layer.down_proj.clone()
    layer.merge()
    layer.enable_adapters(True)
    assert layer.merged_adapters == ["a"] and not torch.equal(layer.base_layer.down_proj, before)
    layer.enable_adapters(False)
    assert not layer.merged_adapters and torch.equal(layer.base_layer.down_proj, before)


def test_an_adapter_comes_back_with_the_values_that_it_had():
    layer = layer_of(adapted(names=["a"]))
    delta = layer.esft_down_proj["a"]
    expected = delta.clone()
    state = layer.adapter_state("a", copy=True)
    delta.data.mul_(2)
    layer.restore_adapter("a", state)
    assert layer.esft_down_proj["a"] is delta and torch.equal(delta, expected)


def test_nothing_is_put_where_rows_lie_that_may_come_back():
    layer = layer_of(adapted())
    layer.freeze_adapter("a")
    layer.resident(("b",))
    expected = {name: rows.clone() for name, rows in layer.bank.residents[("a",)].rows.items()}
    state = layer.adapter_state("a", copy=False)
    layer.discard_adapter("a")
    layer.resident(("c",))  # as many rows
    layer.restore_adapter("a", state)
    rows = layer.resident(("a",)).rows
    assert all(torch.equal(rows[name], value) for name, value in expected.items())


def test_a_layer_without_tensors_of_its_own_moves_only_with_what_is_in_it():
    layer = layer_of(adapted(names=["a"]))
    layer.to_empty(device="meta", recurse=False)
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}
    layer.to_empty(device="meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
