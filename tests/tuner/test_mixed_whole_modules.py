"""`adapter_names` where adapters also train what is no expert: equal to each sample alone, or refused.

Mixers, attention with sinks and the like keep a state or a cache. To call them once for each adapter would be wrong.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, find_experts

import zoo


NAMES = ["a", "b", "__base__", "a"]
HYBRID = ["phimoe", "jamba", "qwen3_next", "qwen3_5_moe", "granitemoehybrid", "nemotron_h", "gpt_oss", "mimo_v2_flash"]


def build(family):
    torch.manual_seed(0)
    base = zoo.build(family)
    containers = find_experts(base)

    def config(*experts):
        target_experts = {p: [e for e in experts if e < c.num_experts] for p, c in containers.items()}
        return ESFTConfig(target_experts=target_experts, train_non_expert_modules=True, init_weights=False)

    model = get_peft_model(base, config(0, 1), adapter_name="a")
    model.add_adapter("b", config(1, 2))
    return model.eval()


def alone(model, inputs, call):
    outputs = []
    for number, name in enumerate(NAMES):
        sample = {key: value[number : number + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(call(sample))
        else:
            model.set_adapter(name)
            outputs.append(call(sample))
    return torch.cat(outputs)


def check(family):
    model = build(family)
    inputs = zoo.inputs_for(model.get_base_model(), rows=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: called.append(path))
        for path, module in model.get_base_model().named_modules()
        if path
    ]
    try:
        mixed = zoo.output_of(model(**inputs, adapter_names=NAMES))
        refused = None
    except ValueError as error:
        refused = str(error)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if refused is not None:
        assert "Call the model once" in refused
        # Before the first layer ran, unless it is its code alone that shows why.
        assert not called or "takes its weight in place of calling it" in refused, refused
        return
    expected = alone(model, inputs, lambda sample: zoo.output_of(model(**sample)))
    torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", HYBRID)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_stateful_modules_are_mixed_right_or_refused(family):
    check(family)


# In these, a sample's output depends on the other samples of its batch.
DEPENDENT = {"nllb_moe"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*zoo.model_types(), *zoo.VARIANTS} - {*HYBRID} - DEPENDENT))
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_all_families_are_mixed_right_or_refused(family):
    check(family)
