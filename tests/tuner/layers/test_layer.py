"""Tests what a layer keeps from one call to the next, and that writes from outside cannot make it stale."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from peft_esft import ESFTConfig, ESFTLayer
from peft_esft.tuner.layers.held import holding, mixed_rows
from peft_esft.tuner.mixed_batch import calling_with

import zoo
from families import tiny_model
from listed import listed_model
from oracle import random_tokens


CHOICES = {"a": [1, 3], "b": [2, 5, 7], "c": [4, 0]}
BUILDS = {"fused": lambda: tiny_model("deepseek_v2"), "listed": listed_model, "stacked": lambda: zoo.build("dbrx")}


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


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=random_tokens(), **inputs)[0]


def tensors_reached(value, seen):
    """All tensors that an object leads to, but for those that a module has as parameters and buffers."""
    if isinstance(value, torch.Tensor):
        return [value]
    if id(value) in seen or isinstance(value, nn.Module | str | int | type(None)):
        return []
    seen.add(id(value))
    inner = [*value.values()] if isinstance(value, dict) else list(value) if isinstance(value, list | tuple) else []
    inner += list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [tensor for item in inner for tensor in tensors_reached(item, seen)]


@pytest.mark.filterwarnings("ignore:.*computes the weights of all experts again")
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_forward_pass_leaves_no_effective_rows_behind(build):
    model = adapted(build(), rank=2)
    layer = layer_of(model)
    for active in ("a", ["a", "b"]):
        model.base_model.set_adapter(active, inference_mode=True)
        logits(model)
    kept = [value for name, value in vars(layer).items() if name not in ("_parameters", "_buffers", "_modules")]
    own = {id(tensor) for tensor in [*layer.parameters(), *layer.buffers()]}
    assert all(id(tensor) in own or not tensor.is_floating_point() for tensor in tensors_reached(kept, set()))


@pytest.mark.filterwarnings("ignore:.*computes the weights of all experts again")
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("active", ["a", ["a", "b"]])
def test_within_a_hold_rows_are_computed_once(monkeypatch, build, active):
    model = adapted(build(), rank=2)
    model.base_model.set_adapter(active, inference_mode=True)
    layer, computed = layer_of(model), []
    original = ESFTLayer.effective_rows
    monkeypatch.setattr(ESFTLayer, "effective_rows", lambda *args: computed.append(args[1]) or original(*args))
    expected = logits(model)
    computed.clear()
    with model.hold():
        for _ in range(3):
            torch.testing.assert_close(logits(model), expected)
        with model.hold():
            logits(model)
        assert sorted(computed) == sorted(layer.weight_names)
    computed.clear()
    logits(model)
    assert computed or build is BUILDS["listed"]  # which asks for single rows


def test_a_hold_ends_with_an_error_too_and_another_thread_is_not_in_it():
    model = adapted(names=["a"])
    layer = layer_of(model)
    with pytest.raises(IndexError), model.hold():
        model(input_ids=torch.full((1, 3), 10_000))
    assert layer.active().held is None and layer_of(model).owner.holds == 0
    with model.hold(), ThreadPoolExecutor(1) as threads:
        held = layer.active().held
        assert layer.selected_weights(layer.active()) == (held, False)
        _, are_deltas = threads.submit(layer.selected_weights, layer.active()).result()
    assert are_deltas


def test_a_hold_that_cannot_begin_leaves_none(monkeypatch):
    model = adapted(names=["a"])
    monkeypatch.setattr(ESFTLayer, "hold", lambda layer: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError), model.hold():
        pass
    assert layer_of(model).owner.holds == 0


def test_calls_that_ask_for_a_gradient_of_the_deltas_never_take_held_rows():
    model = adapted(names=["a"])
    model.base_model.set_adapter("a")
    with model.hold():
        model(input_ids=random_tokens())[0].sum().backward()
    assert all(delta.grad is not None for delta in layer_of(model).parameters() if delta.requires_grad)


def test_a_switch_within_a_hold_is_held_too():
    model = adapted()
    layer = layer_of(model)
    with model.hold():
        model.base_model.set_adapter("b", inference_mode=True)
        assert layer.active().held is not None
        found = logits(model)
    torch.testing.assert_close(found, logits(model))


def test_generate_holds_whether_the_adapter_is_trainable_or_not(monkeypatch):
    torch.manual_seed(0)
    config = ESFTConfig(target_experts={1: [1, 3]}, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("olmoe"), config).eval()
    assert any(parameter.requires_grad for parameter in model.parameters())
    held = []
    original = ESFTLayer.held_rows

    def held_rows(layer, active):
        held.append(original(layer, active) is not None)
        return original(layer, active)

    monkeypatch.setattr(ESFTLayer, "held_rows", held_rows)
    model.generate(input_ids=random_tokens(), max_new_tokens=3, do_sample=False)
    assert held and all(held)


@pytest.mark.parametrize("family", ["olmoe", "listed"])
def test_rows_of_an_adapter_that_is_stored_as_rows_are_its_tensors(family):
    model = adapted(listed_model() if family == "listed" else tiny_model("olmoe"), names=["a", "b"])
    layer = layer_of(model)
    layer.freeze_adapter("a")
    logits(model)
    stored = layer.stored_rows_of("a")
    assert all(rows is stored[name] for name, rows in layer.selected_weights(layer.active())[0].items())


def test_a_bank_is_made_anew_when_an_adapter_joins_or_leaves_and_never_written_to():
    model = adapted()
    layer = layer_of(model)
    for name in ("a", "b"):
        layer.freeze_adapter(name)
    first = mixed_rows(layer, ["a", "__base__", "b"])
    kept = {name: (rows, rows.clone(), rows._version) for name, rows in first.rows.items()}
    assert mixed_rows(layer, ["b"]).rows is first.rows
    layer.freeze_adapter("c")
    second = mixed_rows(layer, ["c", "a"])
    assert second.rows is not first.rows
    for name, rows in second.rows.items():
        assert len(rows) == 7
        assert all(torch.equal(second.of(1)[name], layer.stored_rows_of("a")[name]) for _ in [0])
        assert layer.stored_rows_of("a")[name].untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    gone = weakref.ref(second.rows["down_proj"])
    del second, rows
    model.delete_adapter("b")
    assert len(layer.bank.rows["down_proj"]) == 4
    gc.collect()
    assert gone() is None
    assert all(torch.equal(rows, copy_) and rows._version == v for rows, copy_, v in kept.values())


def test_rows_of_other_adapters_are_put_together_for_each_call_and_once_for_a_hold():
    layer = layer_of(adapted())
    layer.freeze_adapter("a")
    one, other = mixed_rows(layer, ["a", "b"]), mixed_rows(layer, ["a", "b"])
    assert one.rows is not other.rows and one.expert_ids == [(1, 3), (2, 5, 7)] and one.starts == [0, 2]
    with holding(layer.owner):
        assert mixed_rows(layer, ["a", "b"]) is mixed_rows(layer, ["a", "b"])
        assert mixed_rows(layer, ["__base__"]) is None


def test_loading_puts_new_tensors_in_the_place_of_stored_rows():
    """A call, or a graph, may still read the old ones."""
    model = adapted(names=["a"])
    layer = layer_of(model)
    layer.freeze_adapter("a")
    old = layer.esft_down_proj_rows["a"]
    before = old.clone()
    state = {key: value + 1 for key, value in layer.state_dict().items() if "rows" in key}
    layer.load_state_dict(state, strict=False)
    assert layer.esft_down_proj_rows["a"] is not old and torch.equal(old, before)
    assert torch.equal(layer.esft_down_proj_rows["a"], before + 1)


def test_layers_unmerge_when_they_are_switched_off_and_not_when_they_are_switched_on():
    model = adapted(names=["a"])
    layer = layer_of(model)
    before = layer.base_layer.down_proj.clone()
    layer.merge()
    layer.enable_adapters(True)
    assert layer.merged_adapters == ["a"] and not torch.equal(layer.base_layer.down_proj, before)
    layer.enable_adapters(False)
    assert not layer.merged_adapters and torch.equal(layer.base_layer.down_proj, before)


def test_a_layer_without_tensors_of_its_own_moves_only_with_what_is_in_it():
    layer = layer_of(adapted(names=["a"]))
    layer.to_empty(device="meta", recurse=False)
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}
    layer.to_empty(device="meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


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

    def taken(active):
        model.base_model.set_adapter(active, inference_mode=True)
        return layer.selected_weights(layer.active())

    weights, are_deltas = taken("a")
    assert are_deltas == are_plain
    if are_plain:
        assert all(weights[name] is layer._tensors(f"esft_{name}")["a"] for name in layer.weight_names)
    assert not taken(["a", "b"])[1]
    model.base_model.set_scale("a", 2.0)
    assert not taken("a")[1]


def test_a_compiled_call_takes_what_the_layer_knows_unless_others_took_its_place(monkeypatch):
    model = adapted(names=["a"])
    layer = layer_of(model)
    layer.hold()
    held, deltas = layer.active().held, layer.active().deltas
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.selected_weights(layer.active())[0] is held
    model.base_model.set_adapter("a")
    taken, are_deltas = layer.selected_weights(layer.active())
    assert are_deltas and all(taken[name] is delta for name, delta in deltas.items())
    new = layer.esft_down_proj["a"] = nn.Parameter(layer.esft_down_proj["a"].detach().clone())
    taken, are_deltas = layer.selected_weights(layer.active())
    assert not are_deltas  # found by name, and added to the base's rows
    expected = layer.base_layer.down_proj[CHOICES["a"]] + new
    assert torch.equal(taken["down_proj"], expected)


def test_tables_are_made_for_training_too_and_belong_to_no_state():
    model = adapted(names=["a", "b"])
    layer = layer_of(model)
    with torch.inference_mode():
        model.base_model.set_adapter(["a", "b"])
    tables = [table for name in ("a", "b", "ab") for table in layer.tables(list(name))]
    assert not any(table.is_inference() for table in tables)
    assert not [*layer.buffers()]
    other = copy.deepcopy(layer)
    assert other.active().index is not layer.active().index
    assert other.active().index is other.tables(["a", "b"])[0]


def test_an_average_of_the_model_follows_it_whichever_adapters_were_used():
    model = adapted()
    average = AveragedModel(model, avg_fn=lambda old, new, number: new)
    logits(model, adapter_names=["c", "b"])
    model.base_model.set_adapter(["a", "b"])
    model.set_adapter("a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update_parameters(model)
    average.update_parameters(model)
    assert torch.equal(logits(average), logits(model))


def routed(layer):
    """What a layer is called with, for six tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(6, layer.in_features, generator=generator),
        "top_k_index": torch.randint(layer.num_experts, (6, 2), generator=generator),
        "top_k_weights": torch.rand(6, 2, generator=generator),
    }


class Caller(nn.Module):
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
        with calling_with(model, names, {layer: mixed_rows(layer, names)}, is_counted=True):
            check()
            layer.enable_adapters(False)
            check()
        check()
    active, mixed, off_in_a_mix, off = outputs
    assert torch.equal(off, layer.base_layer(hidden_states, *inputs.values())) and torch.equal(off_in_a_mix, off)
    torch.testing.assert_close(mixed[2:4], off[2:4])
    torch.testing.assert_close(mixed[4:], active[4:])
    assert not torch.allclose(mixed[:2], active[:2]) and not torch.allclose(mixed[:2], off[:2])


def test_hooks_of_the_experts_module_run_around_the_adapted_forward():
    model = adapted(names=["a"])
    layer = layer_of(model)
    expected = logits(model)
    calls = []
    before = layer.base_layer.register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    after = layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    assert not torch.allclose(logits(model), expected) and calls == [3]
    logits(model, adapter_names=["a"] * len(random_tokens()))
    assert calls == [3, 3]
    before.remove()
    after.remove()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how", ["active", "mixed", "disabled"])
def test_what_a_hook_writes_to_the_experts_module_is_there_afterwards(how):
    """As ZeRO-3 does, which counts on the module what it has still to wait for."""
    model = adapted(names=["a"])
    experts = layer_of(model).base_layer

    def before(module, args):
        assert isinstance(module, type(experts)) and "forward" not in vars(module)
        module.calls = getattr(experts, "calls", 0) + 1

    experts.register_forward_pre_hook(before)
    if how == "disabled":
        with model.disable_adapter():
            logits(model)
    else:
        logits(model, adapter_names=["a"] * len(random_tokens()) if how == "mixed" else None)
    assert experts.calls == 1


def test_a_layer_that_is_not_set_up_yet_has_no_attributes_of_its_experts():
    """As while it is copied or unpickled."""
    with pytest.raises(AttributeError, match="base_layer"):
        ESFTLayer.__new__(ESFTLayer).weights  # noqa: B018


def test_tables_lie_where_the_experts_are_computed_with_and_never_on_meta():
    layer = layer_of(adapted(tiny_model("olmoe").to("meta"), names=["a"]))
    assert layer.active().index.tolist() == CHOICES["a"] and layer.active().slots.device.type == "cpu"
    layer = layer_of(adapted(cpu_offload(tiny_model("olmoe")), names=["a"]))
    assert layer.compute_device.type == "cpu"
    layer.base_layer._hf_hook.execution_device = "cuda:1"
    assert layer.compute_device == torch.device("cuda:1")


def test_an_adapter_stored_as_rows_begins_with_the_rows_of_the_base():
    layer = layer_of(adapted(tiny_model("olmoe").bfloat16(), names=["a"], storage="rows"))
    for name, rows in layer.stored_rows_of("a").items():
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, getattr(layer.base_layer, name)[CHOICES["a"]])


@pytest.mark.filterwarnings("ignore:Adapter a was active which is now deleted")
def test_after_a_deletion_the_layer_has_another_active_adapter():
    model = adapted()
    layer = layer_of(model)
    layer.delete_adapter("a")
    assert "a" not in layer.active_adapters and layer.active().names == tuple(layer.active_adapters)


def test_a_layer_is_converted_with_all_that_is_in_it():
    layer = layer_of(adapted())
    layer.merge()
    layer._apply(lambda tensor: tensor.double())
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert {rows.dtype for rows in layer.merge_record.rows.values()} == {torch.float64}


def test_a_layer_checks_what_it_merges_only_if_it_is_asked_to():
    layer = layer_of(adapted(names=["a"]))
    with torch.no_grad():
        layer.delta_parameters("down_proj", "a")[0].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"adapter a seems to be broken \(in down_proj of model\.layers\.1"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    layer.merge()
    assert layer.merged


def test_a_hold_passes_layers_without_an_active_adapter():
    model = adapted()
    layer = layer_of(model)
    expected = logits(model)
    with model.base_model.hold(), model.disable_adapter():
        layer.hold()
        assert layer.active() is None
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_was_loaded_in_inference_mode_can_be_trained(tmp_path, low_cpu_mem_usage):
    adapted(names=["a"]).save_pretrained(tmp_path)
    model = adapted(names=["b"])
    with torch.inference_mode():
        model.load_adapter(tmp_path / "a", "a", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("a")
    model(input_ids=random_tokens())[0].mean().backward()
    assert all(delta.grad is not None for delta in layer_of(model).delta_parameters("down_proj", "a"))


def test_parameters_that_come_back_from_offloading_are_trained_or_not_as_before(tmp_path):
    model = adapted(storage="delta")
    model.set_adapter("a")
    layer = layer_of(model)
    before = {name: p.requires_grad for name, p in layer.named_parameters() if ".esft_" in f".{name}"}
    assert set(before.values()) == {True, False}
    cpu_offload(model, execution_device=torch.device("cpu"))
    layer.discard_adapter("c")
    after = {name: p.requires_grad for name, p in layer.named_parameters() if ".esft_" in f".{name}"}
    assert after == {name: is_trained for name, is_trained in before.items() if not name.endswith(".c")}
    assert all(isinstance(p, nn.Parameter) for p in layer.delta_parameters("down_proj", "a"))


@pytest.mark.parametrize("init_weights", [True, False])
def test_factors_begin_as_lora_s(init_weights):
    config = ESFTConfig(target_experts={1: [1, 3, 5]}, rank=8, init_weights=init_weights)
    layer = layer_of(get_peft_model(tiny_model("olmoe"), config))
    for name in layer.weights:
        a, b = layer.delta_parameters(name, "default")
        bound = a.shape[-1] ** -0.5
        assert a.abs().max() <= bound and -0.9 * bound > a.min() and a.max() > 0.9 * bound
        assert bool(b.any()) != init_weights
        if not init_weights:
            assert b.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
    ids=str,
)
def test_deltas_have_the_dtype_of_the_base_but_at_least_fp32(dtype, expected):
    for settings in ({}, {"rank": 2}):
        layer = layer_of(adapted(tiny_model("olmoe").to(dtype), names=["a"], **settings))
        assert {delta.dtype for delta in layer.delta_parameters("down_proj", "a")} == {expected}


@pytest.mark.parametrize("to_base_dtype", [True, False])
def test_a_layer_knows_whether_deltas_are_in_the_base_s_dtype(to_base_dtype):
    layer = layer_of(adapted(tiny_model("olmoe").bfloat16(), names=["a"]))
    layer.cast_adapter("a", to_base_dtype=to_base_dtype)
    assert layer.adapters["a"].in_base_dtype is to_base_dtype
    expected = torch.bfloat16 if to_base_dtype else torch.float32
    assert {delta.dtype for delta in layer.delta_parameters("down_proj", "a")} == {expected}
