"""What a layer remembers from one call to the next, and when it lets go of it."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model

from peft_esft import ESFTConfig, ESFTLayer
from peft_esft.tuner.mixed_batch import calling_with

import zoo
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


@pytest.mark.filterwarnings("ignore:.*writes the whole weights of all experts anew")
@pytest.mark.parametrize("build", [lambda: tiny_model("deepseek_v2"), listed_model, lambda: zoo.build("dbrx")])
def test_rows_of_adapters_that_are_not_trained_are_computed_once(monkeypatch, build):
    model = adapted(build())
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


@pytest.mark.parametrize("build", [tiny_model, listed_model], ids=["fused", "listed"])
def test_what_is_kept_of_adapters_ends_when_they_are_trained_again(build):
    model = adapted(build("deepseek_v2") if build is tiny_model else build(), names=["a"])
    layer = layer_of(model)
    logits(model)
    call = layer.current_call()
    assert call.rows is layer.resident(("a",)).rows
    model.base_model.set_adapter("a")
    assert layer.current_call() is call and call.rows is None
    assert layer.resident(("a",)) is None
    assert not layer.bank.residents


def test_rows_of_an_adapter_in_training_are_computed_anew_for_whoever_asks():
    """Fused optimizers write to deltas without raising their version, as `.data` does."""
    model = adapted(names=["a"])
    model.base_model.set_adapter("a")
    layer = layer_of(model)
    before = layer.resident(("a",), in_training=False).rows["down_proj"].clone()
    layer.esft_down_proj["a"].data.mul_(2)
    after = layer.resident(("a",), in_training=False).rows["down_proj"]
    base = layer.base_layer.down_proj[CHOICES["a"]]
    torch.testing.assert_close(after - base, 2 * (before - base), rtol=1e-4, atol=1e-6)
    assert layer.call_of(("a",)).rows is None


@pytest.mark.parametrize("key", [("a",), ("a", "b")])
def test_rows_hold_the_tensors_that_they_were_computed_from(key):
    """Else these could end, and others get their ids."""
    layer = layer_of(adapted())
    resident = layer.resident(key)
    assert len(resident.sources) == 2 + 2 * len(key)
    assert all(one is other for one, other in zip(resident.sources, layer._sources(key), strict=True))


def test_rows_made_in_inference_mode_may_take_part_in_training():
    model = adapted(names=["a", "b"])
    layer = layer_of(model)
    with torch.inference_mode():
        model(input_ids=random_tokens())
        assert not any(rows.is_inference() for rows in layer.resident(("a",)).rows.values())
        layer.freeze_adapter("b")
        model.base_model.set_scale("b", 2.0)  # takes its rows out of the bank
        assert not layer.esft_down_proj_rows["b"].is_inference()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_adapters_that_are_stored_as_rows_have_them_once(scale):
    """In the bank, if that has the stored rows and not scaled ones."""
    model = adapted(names=["a", "b"])
    layer = layer_of(model)
    layer.freeze_adapter("a")
    stored = layer.esft_down_proj_rows["a"].clone()
    model.base_model.set_scale("a", scale)
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    logits(model)
    model.base_model.set_adapter("a", inference_mode=True)
    logits(model)
    resident, both = layer.resident(("a",)), layer.bank.residents[("a", "b")]
    assert torch.equal(layer.esft_down_proj_rows["a"], stored)
    assert all(
        (rows is getattr(layer, f"esft_{name}_rows")["a"]) == (scale == 1.0) for name, rows in resident.rows.items()
    )
    # What is computed from the stored rows still holds, though these lie elsewhere now.
    assert layer.resident(("a",)) is resident
    assert all(one is other for one, other in zip(resident.sources, layer._sources(("a",)), strict=True))
    assert layer.resident(("a", "b")).place is both.place


@pytest.mark.parametrize(
    ("build", "settings", "are_plain"),
    [
        (tiny_model, {}, True),
        (tiny_model, {"rank": 2}, False),
        (tiny_model, {"storage": "rows"}, False),
        (listed_model, {}, False),
    ],
)
def test_deltas_that_are_simply_added_are_taken_as_they_are(build, settings, are_plain):
    model = adapted(build("deepseek_v2") if build is tiny_model else build(), names=["a", "b"], **settings)
    layer = layer_of(model)
    call = layer.call_of(("a",))
    expected = {name: layer._tensors(f"esft_{name}")["a"] for name in layer.weight_names} if are_plain else None
    assert call.deltas == expected if expected is None else all(call.deltas[n] is d for n, d in expected.items())
    assert layer.call_of(("a", "b")).deltas is None
    layer.set_scale("a", 2.0)
    assert layer.call_of(("a",)).deltas is None


def test_a_compiled_call_takes_what_its_layer_knows(monkeypatch):
    """A graph neither asks the bank nor writes to the layer; deltas that were replaced are not taken."""
    model = adapted(names=["a"])
    layer = layer_of(model)
    logits(model)
    call = layer.current_call()
    rows, deltas = call.rows, call.deltas
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.weights_for(call) == (rows, False) and layer.weights_for(call)[0] is rows
    model.base_model.set_adapter("a")
    taken, are_deltas = layer.weights_for(call)
    assert taken is deltas and are_deltas is True
    new = layer.esft_down_proj["a"] = torch.nn.Parameter(layer.esft_down_proj["a"].detach().clone())
    taken, are_deltas = layer.weights_for(call)
    assert taken["down_proj"] is new and are_deltas is True
    assert call.deltas is deltas
    monkeypatch.undo()
    layer.weights_for(call)
    assert call.deltas["down_proj"] is new


def routed(layer):
    """What a layer is called with, for six tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(6, layer.in_features, generator=generator),
        "top_k_index": torch.randint(layer.num_experts, (6, 2), generator=generator),
        "top_k_weights": torch.rand(6, 2, generator=generator),
    }


class Caller(torch.nn.Module):
    """A model of one layer, which it calls by position or by keywords."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, by_keywords, **others):
        inputs = {"hidden_states": hidden_states, **others}
        return self.layer(**inputs) if by_keywords else self.layer(*inputs.values())


def test_a_layer_can_be_called_by_keywords():
    layer = layer_of(adapted())
    model = Caller(layer)
    inputs = routed(layer)
    hidden_states = inputs.pop("hidden_states")

    def check():
        outputs.append(model(hidden_states, by_keywords=False, **inputs))
        assert torch.equal(model(hidden_states, by_keywords=True, **inputs), outputs[-1])

    outputs = []
    with torch.no_grad():
        check()
        names = ["b", "__base__", "a"]
        with calling_with(model, names, {layer: layer.plan_mixed(names)}):
            check()
            layer.enable_adapters(False)
            check()
        check()
    active, mixed, off_in_a_mix, off = outputs
    assert torch.equal(off, layer.base_layer(hidden_states, *inputs.values())) and torch.equal(off_in_a_mix, off)
    torch.testing.assert_close(mixed[2:4], off[2:4])
    torch.testing.assert_close(mixed[4:], active[4:])
    assert not torch.allclose(mixed[:2], active[:2]) and not torch.allclose(mixed[:2], off[:2])


def test_a_layer_that_is_not_set_up_yet_has_no_attributes_of_its_experts():
    """As while it is copied or unpickled."""
    with pytest.raises(AttributeError, match="base_layer"):
        ESFTLayer.__new__(ESFTLayer).weights  # noqa: B018


def test_tables_lie_where_the_experts_are_computed_with_and_never_on_meta():
    layer = layer_of(adapted(tiny_model("olmoe").to("meta"), names=["a"]))
    call = layer.call_of(("a",))
    assert call.index.tolist() == CHOICES["a"] and call.slots.device.type == "cpu"
    layer = layer_of(adapted(cpu_offload(tiny_model("olmoe")), names=["a"]))
    assert layer._table_device().type == "cpu"
    layer.base_layer._hf_hook.execution_device = "cuda:1"
    assert layer._table_device() == torch.device("cuda:1")
