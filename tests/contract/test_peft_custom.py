"""PEFT's tests of models that are no transformers models, on toy models with experts."""

from __future__ import annotations

import re

import pytest
from torch import nn

from peft_esft import ESFTConfig

from harness import Declared, peft_tests, transplant
from toys import BLOCKS, FromPretrained, ToyMLP, deep_toy, mlp_of_experts, on_modules


test_custom_models = peft_tests("test_custom_models")
test_custom_models.MockTransformerWrapper.from_pretrained = FromPretrained.from_pretrained
test_custom_models.MLP = ToyMLP
test_custom_models.DeepMLP = deep_toy

esft_on_modules = on_modules(ESFTConfig)
DELTAS = ("esft_gate_up_proj", "esft_down_proj")

BOTH_LAYERS = {0: [1, 3, 0, 6], 1: [0, 4, 2, 7]}
SETTINGS = {
    "one layer": {"target_experts": {"layers.1.lin0": [5, 1, 3]}},
    "both layers": {"target_experts": BOTH_LAYERS},
    "every expert": {"target_experts": {0: range(8), 1: range(8)}},
    "modules_to_save": {"target_experts": BOTH_LAYERS, "modules_to_save": ["head"]},
    "exclude_modules": {"target_experts": BOTH_LAYERS, "exclude_modules": ["layers.0.lin0"]},
}
PAIRS = {
    "same experts": ({"lin0": [0, 1, 3]}, {"lin0": [0, 1, 3]}),
    "other experts": ({"lin0": [0, 1, 3]}, {"lin0": [5, 4, 2]}),
    "overlapping experts": ({"lin0": [0, 1, 3]}, {"lin0": [4, 3, 1]}),
    "other layers": ({"lin0": [0, 1, 3]}, {"experts1": [0, 2, 3, 4]}),
}
TABLES = {
    "test_name, model_id, config_cls, config_kwargs": [
        (f"{kind} {name}", kind, ESFTConfig, settings) for kind in BLOCKS for name, settings in SETTINGS.items()
    ],
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": [
        (name, "esft", ESFTConfig, *({"target_experts": experts, "init_weights": False} for experts in pair))
        for name, pair in PAIRS.items()
    ],
    "mixed": [
        False,
        pytest.param(True, marks=Declared("ESFT is refused in a PeftMixedModel", ValueError).mark),
    ],
    "config_cls": [pytest.param(esft_on_modules, id="ESFTConfig")],
    "config0": [pytest.param(esft_on_modules(target_modules=["lin0"], init_weights=False), id="ESFTConfig")],
}

METHOD_OF_NO_IMPORTANCE = {
    name: {"LoraConfig": esft_on_modules}
    for name in (
        "test_add_adapter_rejects_duplicate_name_without_mutation",
        "test_delete_adapter_with_multiple_adapters_works",
        "test_delete_adapter_multiple_adapters_with_modules_to_save",
        "test_existing_model_card",
        "test_non_existing_model_card",
        "test_requires_grad_follows_inference_mode_modules_to_save",
        "test_requires_grad_lora_same_targets",
        "test_requires_grad_modules_to_save_default",
        "test_requires_grad_modules_to_save_disabling",
        "test_requires_grad_modules_to_save_multiple_adapters",
    )
} | {"test_requires_grad_lora_different_targets": {"LoraConfig": esft_on_modules, "MLP": mlp_of_experts}}
"""Tests that name LoRA but hold for every method."""

NO_BIAS = Declared("experts are trained whole: there is no `bias` option")
NO_DEFAULTS = Declared("ESFT has no default targets: what a task uses is measured", TypeError)
DECLARED = {
    "test_add_weighted_adapter_cat_with_rank_pattern": Declared("builds a LoRA adapter for every method", ValueError),
    "test_adding_multiple_adapters_with_bias_raises": NO_BIAS,
    "test_default_target_modules_list_of_str": NO_DEFAULTS,
    "test_default_target_modules_not_set_model_type_set_raises": NO_DEFAULTS,
    "test_default_target_modules_not_set_raises": NO_DEFAULTS,
    "test_default_target_modules_str": NO_DEFAULTS,
    "test_disable_adapter_with_bias_warns": NO_BIAS,
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": NO_BIAS,
} | {
    f"test_active_adapter[{kind} modules_to_save]": Declared("PEFT activates one adapter with modules_to_save at most")
    for kind in BLOCKS
}

globals().update(
    {
        name: transplant(member, TABLES, DECLARED, written_for=METHOD_OF_NO_IMPORTANCE)
        for name, member in vars(test_custom_models).items()
        if name.startswith("Test")
    }
)


def _check_requires_grad(self: object, model: nn.Module, *expected: str) -> None:
    """PEFT's check, which names the parameters that LoRA would have."""
    names = {re.sub(r"lora_[AB]\.(\w+)\.weight", rf"{weight}.\1", name) for name in expected for weight in DELTAS}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names


TestRequiresGrad.check_requires_grad = _check_requires_grad  # noqa: F821 (one of the classes above)
