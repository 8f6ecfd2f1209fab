"""Tests that what is held belongs to one hold, and to the adapters as they are."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from peft_esft import ESFTConfig, hotswap_adapter
from peft_esft.tuner.restoring import restoring

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


def config(*experts, **fields):
    return ESFTConfig(target_experts={1: list(experts)}, init_weights=False, **fields)


def adapted_model(seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model("olmoe"), config(1, 5), adapter_name="a")
    model.add_adapter("b", config(2, 5, 0))
    return model.eval()


@torch.no_grad()
def both_outputs(model):
    return model(input_ids=TOKENS)[0], model(input_ids=TOKENS, adapter_names=NAMES)[0]


def assert_same(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def double(model, name="a"):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".esft_" in key and key.endswith(f".{name}"):
                parameter.data.mul_(2)


def add_again(model, folder):
    model.delete_adapter("b")
    model.add_adapter("b", config(2, 5, 0))


def load_state(model, folder):
    model.load_state_dict({k: v * 2 if ".esft_" in k else v for k, v in model.state_dict().items()})


def merge_for_a_while(model, folder):
    model.merge_adapter(["a", "b"])
    model.unmerge_adapter()


OPERATIONS = {
    "set_adapter": lambda model, folder: model.set_adapter("b"),
    "set_scale": lambda model, folder: model.base_model.set_scale("b", 3.0),
    "hotswap": lambda model, folder: hotswap_adapter(model, folder / "a", "a"),
    "add_again": add_again,
    "add_in_another_layer": lambda model, folder: (
        "c" in model.peft_config or model.add_adapter("c", ESFTConfig(target_experts={0: [3]}, init_weights=False))
    ),
    "freeze": lambda model, folder: model.base_model.freeze_adapter("a"),
    "load_state": load_state,
    "merge": merge_for_a_while,
    "cast": lambda model, folder: model.double().float(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    adapted_model(seed=1).save_pretrained(folder)
    return folder


@settings(max_examples=25)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore")
def test_what_is_done_within_a_hold_is_seen_at_once(folder, names):
    model, other = adapted_model(), adapted_model()
    with model.base_model.hold():
        for name in names:
            both_outputs(model)
            OPERATIONS[name](model, folder)
            OPERATIONS[name](other, folder)
            found = both_outputs(model)
            # Of models that are in no hold, all rows are live.
            other.load_state_dict(model.state_dict())
            assert_same(found, both_outputs(other))


def test_a_hold_of_one_model_is_none_of_another():
    model, teacher = adapted_model(), adapted_model(seed=1)
    with teacher.base_model.hold():
        both_outputs(model)
        double(model)
        found = both_outputs(model)
    assert_same(found, both_outputs(model))


def test_a_copy_of_a_held_model_is_not_held():
    model = adapted_model()
    with model.base_model.hold():
        both_outputs(model)
        copied = copy.deepcopy(model)
    assert all(layer.active().held is None for layer in copied.base_model._layers())
    for _ in range(2):
        with copied.base_model.hold():
            found = both_outputs(copied)
        assert_same(found, both_outputs(copied))
        double(copied)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_operation_that_fails_beside_a_hold_leaves_the_hold_alone(is_first):
    """As in two threads: the hold begins or ends while the other one's operation runs."""
    model = adapted_model()
    hold, layers = model.base_model.hold(), model.base_model._layers()
    if is_first:
        hold.__enter__()
    with suppress(MemoryError), restoring(model.base_model):
        if is_first:
            hold.__exit__(None, None, None)
        else:
            hold.__enter__()
        raise MemoryError
    assert [layer.owner.holds for layer in layers] == [0 if is_first else 1]
    if not is_first:
        hold.__exit__(None, None, None)
    double(model)
    with model.base_model.hold():
        found = both_outputs(model)
    assert_same(found, both_outputs(model))
