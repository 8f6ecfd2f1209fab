"""Base weights that are computed from other tensors, shared, or not there: merged right, or refused unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune

from peft_esft import ESFTConfig, ESFTLayer

from families import tiny_model
from listed import listed_model
from oracle import random_tokens


TOKENS = random_tokens(2, 6)
FAMILIES = {"olmoe": lambda: tiny_model("olmoe"), "gpt_oss": lambda: tiny_model("gpt_oss"), "listed": listed_model}


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


def parametrized(owner: nn.Module, name: str) -> None:
    parametrize.register_parametrization(owner, name, Scaled())


def pruned(owner: nn.Module, name: str) -> None:
    prune.random_unstructured(owner, name, 0.3)


def plain_tensor(owner: nn.Module, name: str) -> None:
    value = getattr(owner, name).detach().clone()
    delattr(owner, name)
    setattr(owner, name, value)


def on_meta(owner: nn.Module, name: str) -> None:
    setattr(owner, name, nn.Parameter(getattr(owner, name).to("meta"), requires_grad=False))


CHANGES = [parametrized, pruned, plain_tensor, on_meta]


def owners(model: nn.Module, weight: str) -> list[tuple[nn.Module, str]]:
    """The modules that own a weight of the selected experts, and its name there."""
    found = []
    for experts in (layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")):
        module = experts.base_layer if isinstance(experts, ESFTLayer) else experts
        if isinstance(module, nn.ModuleList):
            found.append((module[1].down_proj if weight == "down_proj" else module[1].up_proj, "weight"))
        else:
            found.append((module, weight))
    return found


def check(family, change, weight, is_late, how):
    torch.manual_seed(0)
    base = FAMILIES[family]().eval()
    layers = [i for i, layer in enumerate(base.model.layers) if hasattr(layer.mlp, "experts")]
    config = ESFTConfig(target_experts={layer: [1, 5] for layer in layers}, init_weights=False)
    error: Exception | None = None
    try:
        if not is_late:
            for owner, name in owners(base, weight):
                change(owner, name)
        model = get_peft_model(base, config).eval()
        if is_late:
            for owner, name in owners(base, weight):
                change(owner, name)
    except (ValueError, NotImplementedError) as refusal:
        error = refusal
    if error is not None:
        assert "experts" in str(error)
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if change is parametrized and is_late and family == "listed":
        # The deltas of modules that are called one by one take the place of their weights, which is refused here.
        with pytest.raises(RuntimeError, match="right_inverse"):
            model(input_ids=TOKENS)
        return
    with torch.no_grad():
        expected = None if change is on_meta else model(input_ids=TOKENS)[0]
    try:
        if how == "merge_and_unload":
            merged = model.merge_and_unload()
        else:
            model.merge_adapter(safe_merge=how == "safe")
            merged = model
    except (ValueError, NotImplementedError, RuntimeError) as refusal:
        error = refusal
    if error is not None:
        assert "experts" in str(error) or change is on_meta  # torch's own words for what has no values
        after = model.state_dict()
        assert all(v.is_meta or torch.equal(after[key], v) for key, v in before.items())
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, ESFTLayer))
        return
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=TOKENS)[0], expected, rtol=1e-4, atol=1e-5)
    if how != "merge_and_unload":
        model.unmerge_adapter()
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_copy_of_a_layer_over_a_parametrized_module_keeps_its_adapter():
    model = get_peft_model(tiny_model("olmoe"), ESFTConfig(target_experts={0: [1, 5]}, init_weights=False)).eval()
    for owner, name in owners(model.get_base_model(), "down_proj"):
        parametrized(owner, name)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(input_ids=TOKENS)[0], model(input_ids=TOKENS)[0])


CASES = (
    st.sampled_from([*FAMILIES]),
    st.sampled_from(CHANGES),
    st.sampled_from(["down_proj", "gate_up_proj"]),
    st.booleans(),
    st.sampled_from(["merge_and_unload", "plain", "safe"]),
)


@given(*CASES)
@settings(max_examples=30)
@pytest.mark.filterwarnings("ignore")
def test_computed_weights_are_merged_right_or_refused(family, change, weight, is_late, how):
    check(family, change, weight, is_late, how)


@pytest.mark.slow
@given(*CASES)
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore")
def test_all_computed_weights_are_merged_right_or_refused(family, change, weight, is_late, how):
    check(family, change, weight, is_late, how)
