"""Tests sequences of operations that gave wrong results once; most were found by `test_state_machine.py`."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, ESFTLayer
from peft_esft.tuner.layers import held

from families import tiny_model
from oracle import random_tokens


TOKENS = random_tokens()
FIRST, SECOND = {0: [5, 1, 6], 1: [2]}, {0: [7, 1]}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]


def two_adapters(first=FIRST, second=SECOND):
    model = get_peft_model(tiny_model("olmoe"), ESFTConfig(target_experts=first, init_weights=False), adapter_name="a")
    model.add_adapter("b", ESFTConfig(target_experts=second, init_weights=False))
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ESFTLayer)]


def test_an_adapter_stored_as_rows_keeps_them_when_it_is_scaled():
    """Its rows lie in the bank, where the scaled ones took their place."""
    model = two_adapters()
    model.base_model.freeze_adapter("a")
    expected = logits(model)
    with torch.no_grad():
        model(input_ids=TOKENS, adapter_names=["a", "b"])
    model.base_model.set_scale("a", -2.0)
    logits(model)
    model.base_model.set_scale("a", 1.0)
    assert torch.equal(logits(model), expected)


def test_an_adapter_stored_as_rows_keeps_what_it_was_given_while_its_old_rows_were_in_the_bank():
    model = two_adapters()
    model.base_model.freeze_adapter("a")
    logits(model)
    model.to(torch.bfloat16).to(torch.float32)
    rounded = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(input_ids=TOKENS, adapter_names=["b", "b"])
    assert all(torch.equal(value, rounded[name]) for name, value in model.state_dict().items())


def test_a_layer_without_the_merged_adapter_adds_no_other_one():
    model = two_adapters()
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    model.merge_adapter(["b"])
    torch.testing.assert_close(logits(model), expected)
    assert model.get_model_status().merged_adapters == ["b"]
    model.unmerge_adapter()
    model.set_adapter("b")
    assert torch.equal(logits(model), expected)


def test_what_was_unloaded_is_let_go():
    model = two_adapters()
    layers = [weakref.ref(layer) for layer in layers_of(model)]
    model.unload()
    gc.collect()
    assert not any(layer() for layer in layers)


def test_a_name_that_no_adapter_has_cannot_be_merged():
    model = two_adapters()
    with pytest.raises(ValueError, match=r"no adapters \['c'\] to merge; there are \['a', 'b'\]"):
        model.merge_adapter(["a", "c"])
    assert not any(layer.merged for layer in layers_of(model))


def test_all_layers_go_on_with_the_same_adapter_after_the_active_one_is_deleted():
    model = two_adapters(first={0: [5]}, second={1: [2]})
    model.add_adapter("c", ESFTConfig(target_experts=FIRST, init_weights=False))
    expected = logits(model)
    model.set_adapter("c")
    with pytest.warns(UserWarning, match="Setting active adapter to a"):
        model.delete_adapter("c")
    assert all(layer.active_adapters == ["a"] for layer in layers_of(model))
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), expected)


def test_a_layer_that_loses_its_only_adapter_keeps_the_model_s_active_one():
    model = two_adapters(first={1: [2]}, second={0: [5]})
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="Setting active adapter to a"):
        model.delete_adapter("b")
    assert all(layer.active_adapters == ["a"] for layer in layers_of(model))
    assert model.active_adapters == ["a"]


def test_a_call_with_adapter_names_lets_go_of_the_rows_when_it_ends(monkeypatch):
    """What it held would keep their memory until Python looks for cycles."""
    model = two_adapters()
    made = []
    original = held._mixed_rows

    def mixed_rows(layer, adapters):
        found = original(layer, adapters)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(held, "_mixed_rows", mixed_rows)
    gc.disable()
    try:
        with torch.no_grad():
            model(input_ids=TOKENS, adapter_names=["a", "b"])
        assert len(made) == len(layers_of(model)) and all(rows() is None for rows in made)
    finally:
        gc.enable()


def test_layers_that_get_their_first_adapter_while_all_are_disabled_are_disabled_too():
    model = get_peft_model(tiny_model("olmoe"), ESFTConfig(target_experts={0: [5]}, init_weights=False)).eval()
    model.base_model.disable_adapter_layers()
    model.add_adapter("b", ESFTConfig(target_experts={1: [0, 1, 5, 6]}, init_weights=False))
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(tiny_model("olmoe")))
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert not torch.equal(logits(model), logits(tiny_model("olmoe")))


@pytest.mark.parametrize("where", ["embed_tokens", "layers.0", "layers.1"])
def test_an_error_while_adapters_are_disabled_leaves_no_part_of_the_model_merged(where):
    model = two_adapters()
    base, expected = logits(tiny_model("olmoe")), logits(model)
    model.merge_adapter()

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.get_base_model().model.get_submodule(where).register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), model.disable_adapter():
        model(input_ids=TOKENS)
    handle.remove()
    assert not any(layer.merged for layer in layers_of(model))
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_merging_goes_on_in_the_dtype_that_the_model_has_by_then():
    """Also where the second adapter has no experts that the first one has not."""
    model = two_adapters(first={0: [5, 1, 6]}, second={0: [1, 5]}).to(torch.bfloat16)
    expected = copy.deepcopy(model).to(torch.float32)
    model.merge_adapter(["a"])
    model.to(torch.float32)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["b"])
    expected.merge_adapter(["a", "b"])
    found = dict(model.named_parameters())
    for name, value in expected.named_parameters():
        assert torch.equal(found[name], value), name
