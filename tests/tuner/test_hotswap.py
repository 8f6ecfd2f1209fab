"""Tests `hotswap_adapter`: one adapter's weights in the place of another's."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_esft import ESFTConfig, ESFTLayer, hotswap_adapter
from peft_esft.interchange import compact

from families import tiny_model
from listed import listed_model
from oracle import config_for, deltas_of, random_tokens, task_loss


TOKENS = random_tokens()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]


def save(folder, build, **settings):
    """An adapter on disk, and the outputs with it."""
    base = build()
    torch.manual_seed(hash(str(folder)) % 1000)
    model = get_peft_model(base, ESFTConfig(init_weights=False, **settings)).eval()
    for delta in deltas_of(model).values():
        delta.data.mul_(5)
    model.save_pretrained(folder)
    return logits(model)


OTHERS = {
    "same experts": {0: [5, 1, 6], 1: [5, 1, 6]},
    "other experts": {0: [0, 2, 7], 1: [1, 5, 3]},
    "more experts": {0: [0, 2, 7, 4], 1: [1]},
    "fewer layers": {1: [4]},
}


@pytest.mark.parametrize("target_experts", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("is_trained", [False, True])
def test_the_new_adapter_answers_in_the_old_one_s_name(target_experts, is_trained, tmp_path):
    def build():
        return tiny_model("olmoe")

    first = save(tmp_path / "first", build, target_experts={0: [5, 1, 6], 1: [5, 1, 6]})
    second = save(tmp_path / "second", build, target_experts=target_experts)
    model = PeftModel.from_pretrained(build(), tmp_path / "first", adapter_name="task", is_trainable=is_trained).eval()
    torch.testing.assert_close(logits(model), first)
    before = deltas_of(model, "task")
    hotswap_adapter(model, tmp_path / "second", adapter_name="task")
    assert torch.equal(logits(model), second)
    assert list(model.peft_config) == ["task"] and model.active_adapters == ["task"]
    after = deltas_of(model, "task")
    assert all(delta.requires_grad == is_trained for delta in after.values())
    assert not any("incoming" in name for name, _ in model.named_parameters())
    if target_experts == OTHERS["same experts"]:
        assert all(after[key] is delta for key, delta in before.items())
    hotswap_adapter(model, tmp_path / "first", adapter_name="task")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path / "again", selected_adapters=["task"])
    again = PeftModel.from_pretrained(build(), tmp_path / "again" / "task")
    assert torch.equal(logits(again), first)
    if is_trained:
        task_loss(model.train()(input_ids=TOKENS)[0]).backward()
        assert all(delta.grad is not None for delta in deltas_of(model, "task").values())


def test_layers_that_had_no_adapter_get_one(tmp_path):
    def build():
        return tiny_model("olmoe")

    second = save(tmp_path, build, target_experts={0: [1], 1: [2]}, rank=2)
    model = get_peft_model(build(), ESFTConfig(target_experts={0: [3]}, inference_mode=True)).eval()
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), second)


def test_lists_of_modules_too(tmp_path):
    second = save(tmp_path, listed_model, target_experts={1: [2, 0]})
    model = get_peft_model(listed_model(), ESFTConfig(target_experts={1: [3]})).eval()
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), second)


def test_other_adapters_and_the_active_one_stay(tmp_path):
    def build():
        return tiny_model("olmoe")

    second = save(tmp_path, build, target_experts={0: [1], 1: [2]})
    model = get_peft_model(build(), config_for(build(), init_weights=False), adapter_name="a").eval()
    expected = logits(model)
    model.add_adapter("b", ESFTConfig(target_experts={0: [7]}, init_weights=False))
    hotswap_adapter(model, tmp_path, adapter_name="b")
    assert torch.equal(logits(model), expected)
    model.set_adapter("b")
    assert torch.equal(logits(model), second)


def test_layers_that_the_new_adapter_leaves_alone_do_not_fall_to_another(tmp_path):
    def build():
        return tiny_model("olmoe")

    second = save(tmp_path, build, target_experts={1: [2]})
    model = get_peft_model(build(), config_for(build(), init_weights=False), adapter_name="other").eval()
    model.add_adapter("task", config_for(build(), init_weights=False))
    model.set_adapter("task")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hotswap_adapter(model, tmp_path, adapter_name="task")
    assert torch.equal(logits(model), second)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path):
    model = get_peft_model(tiny_model("olmoe"), config_for(tiny_model("olmoe"), init_weights=False)).eval()
    expected, before = logits(model), str(model)
    save(tmp_path / "other", lambda: tiny_model("mixtral"), target_experts={0: [1]})
    config = ESFTConfig(target_experts={7: [0]})
    config.save_pretrained(tmp_path / "other")
    get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="layer 7 has no experts module"):
        hotswap_adapter(model, tmp_path / "other")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        hotswap_adapter(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"no adapter 'law' to replace; there are \['default'\]"):
        hotswap_adapter(model, tmp_path / "lora", adapter_name="law")
    assert torch.equal(logits(model), expected)
    assert str(model) == before and list(model.peft_config) == ["default"]
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged"):
        hotswap_adapter(model, tmp_path / "lora")


def test_weights_of_another_shape_are_refused_and_nothing_is_changed(tmp_path):
    save(tmp_path, lambda: tiny_model("olmoe"), target_experts={0: [1, 2]})
    ESFTConfig(target_experts={"model.layers.0.mlp.experts": [1]}).save_pretrained(tmp_path)
    model = get_peft_model(tiny_model("olmoe"), config_for(tiny_model("olmoe"), init_weights=False)).eval()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"the adapter's weights do not fit: .* are for the experts"):
        hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]
    assert all([*m.expert_ids] == ["default"] for m in model.modules() if isinstance(m, ESFTLayer))


def test_an_adapter_of_any_name_stays(tmp_path):
    model = get_peft_model(tiny_model("olmoe"), ESFTConfig(target_experts={0: [1, 2]}, init_weights=False), "a").eval()
    for name in ("a_incoming", "a_incoming_0"):
        model.add_adapter(name, ESFTConfig(target_experts={0: [1, 2]}, init_weights=False))
    expected = save(tmp_path, lambda: tiny_model("olmoe"), target_experts={0: [5, 6], 1: [3]})
    others = {name: p.clone() for name, p in model.named_parameters() if "_incoming" in name}
    hotswap_adapter(model, tmp_path, adapter_name="a")
    torch.testing.assert_close(logits(model), expected)
    assert set(model.peft_config) == {"a", "a_incoming", "a_incoming_0"}
    found = {name: p for name, p in model.named_parameters() if "_incoming" in name}
    assert found.keys() == others.keys() and all(torch.equal(found[name], p) for name, p in others.items())


def test_parameters_stay_the_same_objects_in_half_precision_too(tmp_path):
    base = tiny_model("olmoe", torch.bfloat16)
    save(tmp_path, lambda: tiny_model("olmoe", torch.bfloat16), target_experts={0: [5, 6]})
    model = get_peft_model(base, ESFTConfig(target_experts={0: [1, 2]}), autocast_adapter_dtype=False)
    before = deltas_of(model)
    model.base_model.set_scale("default", 2.0)
    hotswap_adapter(model, tmp_path)
    after = deltas_of(model)
    assert all(after[key] is delta and delta.dtype == torch.bfloat16 and delta.any() for key, delta in before.items())
    assert {layer.adapters["default"].scale for layer in model.modules() if isinstance(layer, ESFTLayer)} == {1.0}


def test_a_model_without_adapters_has_none_to_replace(tmp_path):
    with pytest.raises(ValueError, match="OlmoeForCausalLM has no ESFT adapter"):
        hotswap_adapter(tiny_model("olmoe"), tmp_path)


def test_weights_for_layers_that_an_adapter_lacks_are_not_loaded_in_its_name(tmp_path):
    """Where the name exists PEFT loads weights alone, and drops in silence what has no place."""
    save(tmp_path / "law", lambda: tiny_model("olmoe"), target_experts={0: [1, 2]})
    save(tmp_path / "intent", lambda: tiny_model("olmoe"), target_experts={0: [5, 6], 1: [3]})
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "law", adapter_name="law").eval()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.esft_\w+ is not selected.*hotswap_adapter"):
        model.load_adapter(str(tmp_path / "intent"), adapter_name="law")
    assert torch.equal(logits(model), expected)
    model.load_adapter(str(tmp_path / "law"), adapter_name="law")
    assert torch.equal(logits(model), expected)


def lora_of_the_same_base(folder):
    get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def compact_form(folder):
    whole = folder.with_name("whole")
    save(whole, lambda: tiny_model("olmoe"), target_experts={0: [1, 2], 1: [3]})
    compact(whole, folder, form="int8")


def diverged(folder):
    save(folder, lambda: tiny_model("olmoe"), target_experts={0: [1, 2], 1: [3]})
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights[max(weights)][0, 0, 0] = float("nan")
    save_file(weights, file)


MISFITS = {
    "other experts in one layer": (
        lambda folder: save(folder, lambda: tiny_model("olmoe"), target_experts={0: [5, 6], 1: [3, 4]}),
        r"layers.1.mlp.experts.esft_\w+ is torch.float32 \[2, .*expected torch.float32 \[1, .*hotswap_adapter",
    ),
    "another form": (compact_form, r"esft_\w+ is missing.*hotswap_adapter"),
    "another method": (lora_of_the_same_base, r"esft_\w+ is missing.*the file has LoRA weights"),
    "no numbers": (diverged, "weights are broken: .* holds a NaN"),
}


@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS)
def test_weights_that_are_no_adapter_s_change_nothing_of_it(make, message, tmp_path):
    """Where the name exists PEFT reads no config, so what the weights are is seen by themselves alone."""
    save(tmp_path / "law", lambda: tiny_model("olmoe"), target_experts={0: [1, 2], 1: [3]})
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "law", adapter_name="law").eval()
    before = {key: delta.clone() for key, delta in deltas_of(model, "law").items()}
    make(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(tmp_path / "other"), adapter_name="law")
    assert all(torch.equal(delta, before[key]) for key, delta in deltas_of(model, "law").items())
    model.load_adapter(str(tmp_path / "law"), adapter_name="law")


def test_what_is_in_training_gives_no_place_to_what_cannot_be_trained(tmp_path):
    compact_form(tmp_path / "int8")
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "whole", is_trainable=True)
    before = deltas_of(model)
    with pytest.raises(ValueError, match=r"'default' is being trained, .* stored as 'int8'"):
        hotswap_adapter(model, tmp_path / "int8")
    after = deltas_of(model)
    assert all(after[key] is delta and delta.requires_grad for key, delta in before.items())
    assert list(model.peft_config) == ["default"] and not model.peft_config["default"].inference_mode
    frozen = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "whole")
    hotswap_adapter(frozen, tmp_path / "int8")
