"""`torch.compile`: no graph break, equal outputs and gradients, and no second compilation for a known adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from peft_esft.layer import ESFTLayer

from families import tiny_model
from oracle import config_for, deltas_of, random_tokens, task_loss


# What torch's compiler says of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run(model, tokens):
    return model(input_ids=tokens, use_cache=False)[0]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "longcat_flash", "muse_spark"])
def test_a_layer_compiles_without_graph_break(family):
    model = get_peft_model(base := tiny_model(family), config_for(base, init_weights=False))
    layer = next(module for module in model.modules() if isinstance(module, ESFTLayer))
    states = torch.randn(7, layer.in_features)
    ids = torch.randint(layer.num_experts + layer.num_identity_experts, (7, 3))
    weights = torch.rand(7, 3)

    def gradients(call):
        leaves = [leaf.clone().requires_grad_() for leaf in (states, weights)]
        output = call(leaves[0], ids, leaves[1])
        deltas = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return [output, *torch.autograd.grad(output.square().sum(), [*leaves, *deltas])]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for own, expected in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(own, expected)


def test_training_compiles_once_for_each_adapter():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, init_weights=False))
    model.add_adapter("other", config_for(base, [0, 2, 7], init_weights=False))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = random_tokens()
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        results = []
        for call in (model, compiled):
            output = run(call, tokens)
            task_loss(output).backward()
            results.append([output, *(delta.grad for delta in deltas_of(model, name).values())])
            model.zero_grad()
        for own, expected in zip(*results, strict=True):
            torch.testing.assert_close(own, expected)
    assert compilations() == 2


def test_inference_compiles_once_for_each_adapter():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, init_weights=False, inference_mode=True))
    model.add_adapter("other", config_for(base, [0, 2, 7], init_weights=False, inference_mode=True))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = random_tokens()
    with torch.no_grad():
        for name in ("default", "other", "default", "other"):
            model.base_model.set_adapter(name, inference_mode=True)
            torch.testing.assert_close(run(compiled, tokens), run(model, tokens))
    assert compilations() == 2


@pytest.mark.slow
def test_inductor_gives_the_same_outputs_and_gradients():
    base = tiny_model("olmoe", torch.bfloat16)
    model = get_peft_model(base, config_for(base, init_weights=False))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    tokens = random_tokens()
    for call in (compiled, reference):
        task_loss(run(call, tokens)).backward()
    for key, delta in deltas_of(model).items():
        expected = deltas_of(reference)[key].grad
        assert (delta.grad - expected).norm() <= 0.05 * expected.norm(), key
