"""Tests `add_weighted_adapter`: several adapters combined into one."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils

from peft_esft import ESFTConfig, ESFTLayer, find_experts
from peft_esft.analysis import adapter_conflicts
from peft_esft.tuner.combination import combine_deltas

from families import tiny_model
from listed import listed_model
from oracle import config_for, random_tokens


TOKENS = random_tokens()
PRUNED = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS)[0]


def two_adapters(base=None):
    base = tiny_model("olmoe") if base is None else base
    paths = list(find_experts(base))
    torch.manual_seed(3)
    model = get_peft_model(base, config_for(base, experts=[5, 1, 6], init_weights=False), adapter_name="a")
    second = ESFTConfig(target_experts={paths[-1]: [1, 7]}, init_weights=False)
    model.add_adapter("b", second)
    for name, parameter in model.named_parameters():
        if ".esft_" in name:
            parameter.data.mul_(3)
    return model.eval()


@pytest.mark.parametrize("build", [lambda: tiny_model("gpt_oss"), listed_model], ids=["fused", "listed"])
def test_a_linear_combination_of_weights_1_equals_both_active(build):
    model = two_adapters(build())
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".both"))
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected)


def test_weights_scale_each_part_and_low_rank_combines_too(tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, rank=2, alpha=8, init_weights=False), adapter_name="a")
    model.add_adapter("b", config_for(base, experts=[1, 0], init_weights=False))
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "mixed")
    model.base_model.set_scale("a", 0.5)
    model.base_model.set_scale("b", -2.0)
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model)
    model.set_adapter("mixed")
    torch.testing.assert_close(logits(model), expected)
    config = model.peft_config["mixed"]
    assert config.rank is None
    assert config.target_experts == {path: [5, 1, 6, 0] for path in find_experts(base)}
    assert config.selection == {"combined": {"a": 0.5, "b": -2.0}, "combination_type": "linear"}
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "mixed")
    torch.testing.assert_close(logits(loaded), expected)


def test_whole_modules_are_combined():
    base = tiny_model("qwen2_moe")
    model = get_peft_model(base, config_for(base, init_weights=False), adapter_name="a")
    model.add_adapter("b", config_for(base, train_shared_experts=True, init_weights=False))
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("combination_type", PRUNED)
@given(seed=st.integers(0, 99), density=st.sampled_from([0.3, 0.7, 1.0]))
@settings(max_examples=10)
def test_equal_expert_sets_combine_as_in_peft(combination_type, seed, density):
    torch.manual_seed(seed)
    deltas = [torch.randn(3, 4, 5) for _ in range(3)]
    weights = [1.0, 0.5, -0.25]
    places = torch.arange(3)
    torch.manual_seed(seed)
    own = combine_deltas([(places, d.clone()) for d in deltas], weights, 3, combination_type, density)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a density of 1
        expected = getattr(merge_utils, combination_type)([d.clone() for d in deltas], torch.tensor(weights), density)
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("combination_type", PRUNED)
def test_experts_of_one_adapter_alone_keep_its_change(combination_type):
    torch.manual_seed(0)
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    own = combine_deltas(
        [(torch.tensor([0, 1]), first), (torch.tensor([2, 3]), second)], [1.0, 1.0], 4, combination_type, 1.0
    )
    torch.testing.assert_close(own, torch.cat([first, second]))


def test_scaling_works_merged_and_unmerged_and_is_undone_by_1():
    model = two_adapters()
    base, expected = copy.deepcopy(model).unload(), logits(model)
    model.base_model.set_scale("a", 0.0)
    torch.testing.assert_close(logits(model), logits(base))
    model.base_model.set_scale("a", 0.5)
    half = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), half)
    with pytest.raises(ValueError, match="'a' is merged"):
        model.base_model.set_scale("a", 1.0)
    model.unmerge_adapter()
    model.base_model.set_scale("a", 1.0)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"no adapter 'c'; there are \['a', 'b'\]"):
        model.base_model.set_scale("c", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "c"], [1, 1], "d"), r"no adapters \['c'\]; there are \['a', 'b'\]"),
        ((["a", "b"], [1], "d"), "2 adapters and 1 weights"),
        (([], [], "d"), "0 adapters and 0 weights"),
        ((["a", "a"], [1, 0.5], "d"), r"\['a', 'a'\]; expected a list of different names"),
        (("ab", [1, 1], "d"), "'ab'; expected a list"),
        ((["a"], [float("nan")], "d"), r"finite numbers .* not by \[nan\]"),
        ((["a"], ["2"], "d"), r"finite numbers .* not by \['2'\]"),
        ((["a"], [1], "law-v1.0"), "'law-v1.0' cannot be an adapter's name"),
        ((["a"], [1], "b"), "already is an adapter 'b'"),
        ((["a"], [1], "d", "cat"), "combination_type is 'cat'; it is one of .*'linear' adds deltas exactly"),
        ((["a"], [1], "d", "ties"), "density is None; give a density above 0"),
        ((["a"], [1], "d", "ties", 0.0), "density is 0.0; give a density above 0"),
        ((["a"], [1], "d", "linear", 0.5), "density has no effect"),
        ((["a"], [1], "d", "ties", 0.5, "loudest"), "majority_sign_method is 'loudest'"),
    ],
)
def test_bad_combinations_are_refused_and_nothing_is_changed(arguments, message):
    model = two_adapters()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert str(model) == before
    assert set(model.peft_config) == {"a", "b"}


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None])
def test_a_scale_is_a_finite_number(scale):
    model = two_adapters()
    expected = logits(model)
    with pytest.raises(ValueError, match="multiplied only by finite numbers"):
        model.base_model.set_scale("a", scale)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("adapters", [["a", "b"], ["b"]], ids=str)
def test_modules_to_save_are_not_lost_in_silence(adapters):
    model = two_adapters()
    model.delete_adapter("b")
    model.add_adapter("b", config_for(tiny_model("olmoe"), modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"modules_to_save cannot be combined: \{'b': \['lm_head'\]\}"):
        model.base_model.add_weighted_adapter(adapters, [1.0] * len(adapters), "c")
    assert set(model.peft_config) == {"a", "b"}


def test_conflicts_name_the_shared_experts_and_how_alike_their_changes_are():
    base = tiny_model("gpt_oss")
    model = get_peft_model(base, config_for(base, experts=[5, 1, 6], init_weights=False), adapter_name="a")
    model.add_adapter("b", ESFTConfig(target_experts={1: [6, 0, 5]}, init_weights=False))
    layer = next(m for m in model.modules() if isinstance(m, ESFTLayer) and "layers.1" in m.path)
    with torch.no_grad():
        for name in layer.weight_names:
            own, other = (getattr(layer, f"esft_{name}")[adapter] for adapter in ("a", "b"))
            other[0] = -2 * own[2]  # expert 6
            other[2] = 3 * own[0]  # expert 5
    report = adapter_conflicts(model, "a", "b")
    assert [(shared.expert, round(shared.cosine, 6)) for shared in report.shared] == [(5, 1.0), (6, -1.0)]
    assert {shared.path for shared in report.shared} == {"model.layers.1.mlp.experts"}
    assert (report.num_trained, report.num_layers, report.shared_per_layer) == ((6, 3), 2, 1.0)
    assert str(report).startswith("a trains 6 experts and b 3; they share 2, 1.00 per layer\n")
    with pytest.raises(ValueError, match=r"no ESFT adapter named 'c'; it has \['a', 'b'\]"):
        adapter_conflicts(model, "a", "c")
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        adapter_conflicts(model, "a", "b")


def test_low_rank_and_full_deltas_are_compared():
    base = tiny_model("gpt_oss")
    model = get_peft_model(base, config_for(base, rank=2, init_weights=False), adapter_name="low")
    model.add_adapter("full", config_for(base, init_weights=False))
    report = adapter_conflicts(model, "low", "full")
    assert len(report.shared) == 6 and all(abs(shared.cosine) < 0.5 for shared in report.shared)


def test_factors_of_numpy_are_kept_as_numbers_of_python(tmp_path):
    model = two_adapters()
    model.base_model.add_weighted_adapter(["a", "b"], [np.float32(0.5), np.float16(2)], "both")
    model.save_pretrained(tmp_path)
    assert ESFTConfig.from_pretrained(tmp_path / "both").selection["combined"] == {"a": 0.5, "b": 2.0}
    # What JSON cannot hold is refused when a config is made, not when it is saved after the training.
    with pytest.raises(ValueError, match=r"selection is malformed: .* not JSON serializable"):
        ESFTConfig(target_experts={0: [1]}, selection={"note": np.float32(0.5)})
