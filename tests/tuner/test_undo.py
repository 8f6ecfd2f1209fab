"""Tests that operations which failed or were interrupted leave nothing behind that later ones could show."""

from __future__ import annotations

from contextlib import contextmanager

import accelerate
import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, hotswap_adapter
from peft_esft.checkpoints import PREVIOUS_SUFFIX, save_adapter
from peft_esft.tuner.layers.layer import ESFTLayer

from families import tiny_model
from oracle import random_tokens


TOKENS = random_tokens()
FIRST, OTHER = {0: [1, 3], 1: [2, 5]}, {0: [6, 7], 1: [0, 1]}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]


def adapted(*names, offload=False, **settings):
    torch.manual_seed(0)
    base, model = tiny_model("olmoe"), None
    if offload:
        accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    for name in names:
        selection = OTHER if name == "other" else FIRST
        config = ESFTConfig(target_experts=selection, init_weights=False, **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


@contextmanager
def failing_in_the_second_layer(monkeypatch, model, method):
    """Has a method of the layers fail in the second one, after it did its work in the first."""
    second = [module for module in model.modules() if isinstance(module, ESFTLayer)][1]
    original = getattr(ESFTLayer, method)

    def fail(layer, *args, **kwargs):
        if layer is second:
            raise KeyboardInterrupt
        return original(layer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ESFTLayer, method, fail)
        yield


@pytest.mark.parametrize("method", ["set_scale", "replace_adapter"])
def test_rows_that_came_back_are_not_overwritten_later(monkeypatch, tmp_path, method):
    model = adapted("a", "b", "other")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    for name in ("a", "b"):
        model.base_model.freeze_adapter(name)
    model.set_adapter("a")
    expected = logits(model)
    model.set_adapter("b")
    logits(model)
    methods = {
        "set_scale": lambda: model.base_model.set_scale("a", 2.0),
        "replace_adapter": lambda: hotswap_adapter(model, tmp_path / "b", "a"),
    }
    with failing_in_the_second_layer(monkeypatch, model, method), pytest.raises(KeyboardInterrupt):
        methods[method]()
    model.base_model.freeze_adapter("other")  # as many rows, which take the first free place
    model.set_adapter("a")
    assert torch.equal(logits(model), expected)


def test_a_switch_that_cannot_unmerge_all_layers_unmerges_none(monkeypatch):
    model = adapted("a", "b")
    model.merge_adapter()
    merged = logits(model)
    with (
        failing_in_the_second_layer(monkeypatch, model, "unmerge"),
        pytest.warns(UserWarning, match="Unmerging the model first"),
        pytest.raises(KeyboardInterrupt),
    ):
        model.set_adapter("b")
    assert torch.equal(logits(model), merged)
    assert model.get_model_status().merged_adapters == ["a"]


@pytest.mark.parametrize("setting", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}], ids=str)
def test_adapters_with_the_same_whole_module_are_refused_before_a_layer_switches(setting):
    model = adapted("default", "other", **setting)
    expected = logits(model)
    model.merge_adapter()
    merged = logits(model)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"] and torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_a_failed_swap_leaves_the_order_of_parameters(monkeypatch, tmp_path):
    model = adapted("a", "b")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    names = [name for name, _ in model.named_parameters()]
    with failing_in_the_second_layer(monkeypatch, model, "replace_adapter"), pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, tmp_path / "b", "a")
    assert [name for name, _ in model.named_parameters()] == names
    hotswap_adapter(model, tmp_path / "b", "a")
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("which", ["resident", "incoming"])
def test_adapters_with_whole_modules_are_not_swapped(tmp_path, which):
    model = adapted("a", modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    if which == "incoming":
        model = adapted("a")
    else:
        model.save_pretrained(tmp_path)
    expected = logits(model)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="modules_to_save"):
        hotswap_adapter(model, tmp_path / "a", "a")
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == keys


def test_a_failed_addition_leaves_whole_modules_of_others_active(monkeypatch):
    model = adapted("a", modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(2)
    expected = logits(model)
    with failing_in_the_second_layer(monkeypatch, model, "update_layer"), pytest.raises(KeyboardInterrupt):
        model.add_adapter("b", ESFTConfig(target_experts=FIRST, modules_to_save=["lm_head"]))
    assert list(model.peft_config) == ["a"]
    assert torch.equal(logits(model), expected)


def test_injecting_an_existing_adapter_in_vain_keeps_it(monkeypatch):
    model = adapted("a")
    expected = logits(model)
    with failing_in_the_second_layer(monkeypatch, model, "update_layer"), pytest.raises(KeyboardInterrupt):
        model.base_model.inject_adapter(model.base_model.model, "a")
    assert list(model.peft_config) == ["a"]
    assert torch.equal(logits(model), expected)


def test_an_offloaded_base_is_unmerged_when_another_adapter_is_set():
    model = adapted("a", "b", offload=True)
    with model.disable_adapter():
        expected = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_an_offloaded_base_that_is_merged_while_disabled_comes_back():
    model = adapted("a", offload=True)
    model.base_model.disable_adapter_layers()
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)


def test_rows_of_an_offloaded_base_are_checked_and_combined():
    model = adapted("a", "b", offload=True)
    model.base_model.freeze_adapter("b")
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected)


def test_a_layer_of_an_offloaded_base_says_who_merges_it():
    model = adapted("a", offload=True)
    layer = next(module for module in model.modules() if isinstance(module, ESFTLayer))
    with pytest.raises(RuntimeError, match="is offloaded"):
        layer.merge()


@pytest.mark.parametrize("unload", ["merge_and_unload", "merge_adapter"])
def test_a_name_that_no_adapter_has_is_refused(unload):
    model = adapted("a")
    with pytest.raises(ValueError, match=r"no adapters \['typo'\]"):
        getattr(model, unload)(adapter_names=["typo"])


def test_the_next_adapter_after_a_deletion_is_trained_only_if_it_was_meant_to_be():
    model = adapted("a", "b", inference_mode=True)
    with pytest.warns(UserWarning, match="Setting active adapter"):
        model.delete_adapter("a")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_casting_an_adapter_leaves_it_frozen(tmp_path):
    model = adapted("a")
    model.save_pretrained(tmp_path)
    model = get_peft_model(tiny_model("olmoe").to(torch.bfloat16), ESFTConfig(target_experts=FIRST))
    model.load_adapter(tmp_path / "a", "b", autocast_adapter_dtype=False)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".b"))


def test_a_folder_of_somebody_else_is_neither_taken_nor_deleted(tmp_path, monkeypatch):
    model = adapted("a")
    folder, previous = tmp_path / "adapter", tmp_path / f"adapter{PREVIOUS_SUFFIX}"
    previous.mkdir()
    (previous / "mine.txt").write_text("mine")

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(model, folder)
    assert not folder.exists()
    save_adapter(model, folder)
    assert (previous / "mine.txt").read_text() == "mine"


NO_NAMES = ["law-v1.0", "train", "keys", "training", "type", "__base__"]
WAYS = {
    "add": lambda model, folder, name: model.add_adapter(name, ESFTConfig(target_experts=FIRST)),
    "load": lambda model, folder, name: model.load_adapter(str(folder), adapter_name=name),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_torch_cannot_keep_are_refused_and_nothing_is_changed(name, way, tmp_path):
    model = adapted("a")
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot be an adapter's name\. A name must not have dots"):
        WAYS[way](model, tmp_path / "a", name)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert list(model.peft_config) == ["a"]
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    assert all(list(layer.expert_ids) == ["a"] for layer in layers)


def test_a_base_that_is_wrapped_under_such_a_name_stays_as_it_was():
    base = tiny_model("olmoe")
    with pytest.raises(ValueError, match="'eval' cannot be an adapter's name"):
        get_peft_model(base, ESFTConfig(target_experts=FIRST), adapter_name="eval")
    assert not any(isinstance(module, ESFTLayer) for module in base.modules())


@pytest.mark.parametrize(
    ("options", "share"), [({}, 1), ({"layers_to_transform": [1]}, 0.5), ({"exclude_modules": ".*0.mlp.experts"}, 0.5)]
)
def test_room_is_asked_for_the_layers_that_options_leave(options, share):
    model = adapted("a")
    of_all = model.base_model.rows_nbytes(ESFTConfig(target_experts=FIRST))
    config = ESFTConfig(target_experts=FIRST, inference_mode=True, **options)
    assert model.base_model.rows_nbytes(config) == share * of_all
    model.add_adapter("b", config)
    model.base_model.freeze_adapter("b")
    held = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("_rows.b"))
    assert held == share * of_all


INTERRUPTED = {
    "add": ("b", lambda model, folder: model.add_adapter("b", ESFTConfig(target_experts=FIRST))),
    "swap": ("a", lambda model, folder: hotswap_adapter(model, folder / "low", "a")),
}


@pytest.mark.parametrize("way", INTERRUPTED)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_torch_may_be_interrupted_between_a_key_and_its_parameter(at, way, tmp_path, monkeypatch):
    adapted("low", rank=2).save_pretrained(tmp_path)
    model = adapted("a")
    expected, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    name, act = INTERRUPTED[way]
    take, left = torch.nn.ParameterDict.__setattr__, [at]

    def interrupted(self, key, value):
        if key == name and isinstance(value, torch.nn.Parameter):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        take(self, key, value)

    monkeypatch.setattr(torch.nn.ParameterDict, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        act(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(logits(model), expected) and list(model.peft_config) == ["a"]
