"""`torch.compile`: no graph break, equal outputs and gradients, one compilation for all adapters of equal size."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_esft import ESFTConfig, find_experts, hotswap_adapter
from peft_esft.tuner.layers.layer import ESFTLayer

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


def compiled_inside(model):
    """Compiles what PEFT's outermost model calls, since that one itself looks at the names of adapters."""
    return torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)


def adapters_of_equal_size(**options):
    base = tiny_model("olmoe")
    experts = {name: config_for(base, ids, init_weights=False, **options) for name, ids in EXPERTS.items()}
    model = get_peft_model(base, experts["first"], adapter_name="first")
    model.add_adapter("second", experts["second"])
    model.add_adapter("third", experts["third"])
    return model


EXPERTS = {"first": [1, 5, 6], "second": [0, 2, 7], "third": [6, 1, 3]}


def test_training_compiles_once_for_adapters_of_equal_size():
    model = adapters_of_equal_size()
    compiled = compiled_inside(model)
    tokens = random_tokens()
    for name in ("first", "second", "third", "first"):
        model.set_adapter(name)
        results = []
        for call in (model, compiled):
            output = run(call, tokens)
            task_loss(output).backward()
            results.append([output, *(delta.grad for delta in deltas_of(model, name).values())])
            model.zero_grad()
        for own, expected in zip(*results, strict=True):
            torch.testing.assert_close(own, expected)
    assert compilations() == 1


def test_training_compiles_once_where_nothing_ran_outside_of_the_graph():
    model = adapters_of_equal_size()
    compiled = compiled_inside(model)
    for name in ("first", "second", "third", "first"):
        model.set_adapter(name)
        task_loss(run(compiled, random_tokens())).backward()
        assert all(delta.grad is not None for delta in deltas_of(model, name).values())
        model.zero_grad()
    assert compilations() == 1


def test_inference_compiles_once_for_adapters_of_equal_size():
    model = adapters_of_equal_size(inference_mode=True).eval()
    compiled = compiled_inside(model)
    tokens = random_tokens()
    with torch.no_grad():
        for name in ("first", "second", "third", "first"):
            model.base_model.set_adapter(name, inference_mode=True)
            # The eager call computes the rows that the compiled one then takes.
            torch.testing.assert_close(run(model, tokens), run(compiled, tokens))
    assert compilations() == 1


def test_a_compiled_model_sees_what_happens_to_its_adapters(tmp_path):
    model = adapters_of_equal_size(inference_mode=True).eval()
    model.save_pretrained(tmp_path)
    compiled = compiled_inside(model)
    tokens = random_tokens()

    def check():
        # The compiled call first: nothing else has looked at the adapter since it was changed.
        own = run(compiled, tokens)
        torch.testing.assert_close(own, run(model, tokens))
        return own

    with torch.no_grad():
        model.base_model.set_adapter("first", inference_mode=True)
        outputs = [check(), check()]
        model.base_model.set_scale("first", 3.0)
        outputs.append(check())
        model.base_model.set_scale("first", 1.0)
        hotswap_adapter(model, tmp_path / "second", "first")
        outputs.append(check())
        before = compilations()
        hotswap_adapter(model, tmp_path / "third", "first")
        outputs.append(check())
        assert compilations() == before
        state = {key: value + 0.1 for key, value in model.state_dict().items() if ".esft_" in key}
        model.load_state_dict(state, strict=False)
        outputs.append(check())
        with model.disable_adapter():
            outputs.append(check())
        model.merge_adapter(["first"])
        torch.testing.assert_close(check(), outputs[-2], rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(check(), outputs[-2])
    assert torch.equal(outputs[0], outputs[1])
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(outputs[1:], 2))


@pytest.mark.slow
@pytest.mark.parametrize("trained_by", ["compiled", "eager"])
@pytest.mark.parametrize("options", [{}, {"rank": 2}], ids=["delta", "rank"])
def test_a_compiled_model_trains_what_peft_has_made_trainable_since(options, trained_by):
    model = adapters_of_equal_size(inference_mode=True, **options).eval()
    model.base_model.set_adapter("first", inference_mode=True)
    compiled = compiled_inside(model)
    tokens = random_tokens()
    with torch.no_grad():
        for call in (model, compiled):
            run(call, tokens)  # with rows that are computed once
    model.set_requires_grad("first", True)
    results = []
    for call in (compiled, model) if trained_by == "compiled" else (model, compiled):
        output = run(call, tokens)
        task_loss(output).backward()
        results.append([output, *(delta.grad.clone() for delta in deltas_of(model, "first").values())])
        model.zero_grad()
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)
    for is_trained in (True, False):  # and what training leaves behind when it ends
        model.set_requires_grad("first", is_trained)
        with torch.no_grad():
            for delta in deltas_of(model, "first").values():
                delta.add_(0.1)
            changed = run(compiled, tokens)
            assert not torch.allclose(changed, output)
            torch.testing.assert_close(changed, run(model, tokens))


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


def test_a_model_that_is_compiled_before_it_is_attached_saves_plain_names(tmp_path):
    def compiled():
        return torch.compile(tiny_model("olmoe"), backend="eager")

    tokens = random_tokens()
    model = get_peft_model(compiled(), config_for(tiny_model("olmoe"), init_weights=False)).eval()
    with torch.no_grad():
        expected = run(model, tokens)
        model.save_pretrained(tmp_path)
        assert set(ESFTConfig.from_pretrained(str(tmp_path)).target_experts) == set(find_experts(tiny_model("olmoe")))
        for base in (tiny_model("olmoe"), compiled()):
            assert torch.equal(run(PeftModel.from_pretrained(base, tmp_path).eval(), tokens), expected)


def test_the_state_dict_of_a_compiled_model_is_saved_under_plain_names(tmp_path):
    model = get_peft_model(tiny_model("olmoe"), config_for(tiny_model("olmoe"), init_weights=False)).eval()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "compiled", state_dict=torch.compile(model, backend="eager").state_dict())
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "compiled")]
    assert files[0] == files[1]
