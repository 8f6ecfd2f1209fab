"""Code that reads a module's weight, or calls a part of it, in place of the module sees the adapters' deltas too."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_esft import ESFTConfig, ESFTLayer
from peft_esft.moe.containers import find_shared_experts
from peft_esft.tuner.layers.listed import ListedExperts

import zoo
from checkpoints import randomize
from families import tiny_model
from listed import GatedMLP, listed_model
from oracle import config_for, random_tokens, task_loss


TOKENS = random_tokens()
READ = ["bailing_hybrid", "glm5_next", "inkling", "inkling2", "kimi_linear", "lfm2_moe", "longcat_flash"]
"""Families whose code reads weights: of short convolutions, of routers."""
OTHERS = sorted({*zoo.model_types(), *zoo.VARIANTS} - {*READ})


@pytest.mark.parametrize("family", [*READ, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.filterwarnings("ignore:.*belong")
def test_all_that_is_no_expert_is_trained_as_in_the_dense_model(family):
    base = zoo.build(family)
    inputs = zoo.inputs_for(base)
    dense = copy.deepcopy(base).requires_grad_(True)
    shared = bool(find_shared_experts(base))
    model = get_peft_model(base, ESFTConfig(train_non_expert_modules=True, train_shared_experts=shared))
    for call in (model, dense):
        output = zoo.output_of(call(**inputs))
        task_loss(output).backward()
    checked = 0
    for layer in (module for module in model.modules() if isinstance(module, ESFTLayer)):
        for name, weight in layer.weights.items():
            expected = dense.get_parameter(f"{layer.path}.{weight.parameter}").grad
            (delta,) = layer.delta_parameters(name, "default")
            assert delta.grad is not None or expected is None or not expected.any(), (layer.path, name)
            if delta.grad is not None and expected is not None:
                torch.testing.assert_close(delta.grad[0], expected, rtol=2e-3, atol=1e-6)
                checked += 1
    assert checked
    randomize(model, 0.02)
    with torch.no_grad():
        unmerged = zoo.output_of(model(**inputs))
        model.merge_adapter()
        merged = zoo.output_of(model(**inputs))
    assert not torch.allclose(unmerged, output)
    torch.testing.assert_close(unmerged, merged, rtol=1e-4, atol=1e-5 * float(merged.abs().max()))


def convolution(model):
    return next(
        layer for layer in model.modules() if isinstance(layer, ESFTLayer) and layer.path.endswith("conv.conv")
    )


def test_a_weight_that_is_read_is_the_effective_one_and_the_base_layer_s_the_base_s():
    model = get_peft_model(zoo.build("lfm2_moe"), ESFTConfig(train_non_expert_modules=True, init_weights=False))
    layer = convolution(model)
    base = layer.get_base_layer().weight
    effective = base + layer.esft_weight["default"][0]
    torch.testing.assert_close(layer.weight, effective)
    assert layer.weight.requires_grad and not base.requires_grad
    assert layer.bias is None and layer.kernel_size == layer.base_layer.kernel_size
    with model.disable_adapter():
        assert layer.weight is base
    model.merge_adapter()
    assert layer.weight is base and torch.equal(base, effective)
    with pytest.raises(AttributeError, match="no attribute 'bases'"):
        layer.bases  # noqa: B018


@torch.no_grad()
def test_a_weight_that_is_read_does_not_know_whose_the_samples_are():
    class Reader(nn.Module):
        """Reads the first convolution's weight, and does nothing else."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return convolution(self.model).weight

    config = ESFTConfig(target_experts={}, train_non_expert_modules=True, init_weights=False)
    model = get_peft_model(zoo.build("lfm2_moe"), config).eval()
    model.base_model.model = Reader(model.base_model.model)
    inputs = {"input_ids": TOKENS}
    with pytest.raises(ValueError, match=r"conv\.conv: the model takes its weight in place of calling it"):
        model(**inputs, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match=r"conv\.conv: Conv1d may keep a state"):
        model(**inputs, adapter_names=["default", "__base__"])
    base = convolution(model).get_base_layer().weight
    assert model(**inputs, adapter_names=["__base__"] * 2) is base
    model.base_model.disable_adapter_layers()
    assert model(**inputs) is base


def test_tied_modules_are_read_with_their_one_delta():
    model = get_peft_model(tiny_model("olmoe", tied=True), ESFTConfig(train_non_expert_modules=True))
    randomize(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(head.weight, embeddings.weight) and head.bias is None
    assert not torch.allclose(head.weight, head.get_base_layer().weight)


@pytest.mark.parametrize("how", ["forward", "parts", "weights", "method"])
def test_experts_of_a_list_are_the_same_however_they_are_called(how, monkeypatch):
    monkeypatch.setattr(GatedMLP, "twice", lambda expert, x: expert(x) + expert.forward(x), raising=False)
    models = []
    for _ in range(2):
        base = listed_model()
        models.append(model := get_peft_model(base, config_for(base)))
        randomize(model)
    experts = next(layer for layer in model.modules() if isinstance(layer, ListedExperts))
    assert experts[0].up_proj.in_features == experts[0].gate_proj.in_features

    def product(part, x):
        return part(x) if how == "parts" else nn.functional.linear(x, part.weight)

    def call(expert, x):
        if how == "forward":
            return expert.forward(x)
        if how == "method":
            return expert.twice(x) - expert.forward(x)
        return product(expert.down_proj, expert.act_fn(product(expert.gate_proj, x)) * product(expert.up_proj, x))

    outputs = []
    for found in models:
        layer = next(module for module in found.modules() if isinstance(module, ListedExperts))
        inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        results = [call(expert, inputs) if found is model else expert(inputs) for expert in layer]
        task_loss(torch.stack(results)).backward()
        outputs.append([torch.stack(results), inputs.grad, *(p.grad for p in found.parameters() if p.requires_grad)])
    for own, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(own, expected)


def test_a_list_s_experts_can_be_set_through_their_wrappers():
    base = listed_model()
    model = get_peft_model(base, config_for(base))
    expert = next(layer for layer in model.modules() if isinstance(layer, ListedExperts))[1]
    expert.note = 3
    assert base.model.layers[1].mlp.experts.base_layer[1].note == 3
    assert len(list(expert.parameters())) == 3
