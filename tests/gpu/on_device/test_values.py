"""What the device computes beside what the host computes: all ways of the products, all architectures, two devices."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model

from peft_esft import quantize_experts
from peft_esft.ops import grouped_mm

from families import FAMILIES, tiny_model
from oracle import config_for, random_tokens, select_in_all, task_loss
from simulated_device import AMPERE, HOPPER, TURING, SimulatedDevice, on_host
from steps import DEVICE, FEW, MANY
from stored_bases import dense_twin
from zoo import VARIANTS, build, inputs_for, model_types, output_of


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def step(family, dtype, size, device):
    """The output and all gradients of a training step, by name, and the output without gradients."""
    torch.manual_seed(0)
    base = tiny_model(family, dtype)
    model = get_peft_model(base, config_for(base, init_weights=False)).to(device)
    tokens = random_tokens(*size).to(device)
    output = model.get_base_model()(input_ids=tokens)[0]
    (output.float() * torch.linspace(-1, 1, output.shape[-1]).to(device)).mean().backward()
    with torch.no_grad():
        inference = model.get_base_model()(input_ids=tokens)[0]
    results = {"output": output, "inference": inference}
    results |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: on_host(tensor.detach()).float() for name, tensor in results.items()}


def check(own, expected, tolerance):
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        error = (tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("card", [HOPPER, AMPERE, TURING])
@pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "longcat_flash"])
def test_a_step_on_the_device_is_the_hosts(family, dtype, size, card):
    expected = step(family, dtype, size, "cpu")
    with SimulatedDevice(card):
        check(step(family, dtype, size, DEVICE), expected, TOLERANCES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("size", [FEW, (4, 12)], ids=["few", "many"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_of_all_families(family, size):
    expected = step(family, torch.float32, size, "cpu")
    with SimulatedDevice(AMPERE):
        check(step(family, torch.float32, size, DEVICE), expected, TOLERANCES[torch.float32])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*each training step computes the weights of all:UserWarning")
@pytest.mark.parametrize("model_type", [*model_types(), *VARIANTS])
def test_all_architectures_run_and_train(model_type):
    def outputs(device):
        host = build(model_type)
        inputs = {key: _moved(value, device) for key, value in inputs_for(host).items()}
        base = host.to(device)
        torch.manual_seed(0)
        config = config_for(base, [0, 1], init_weights=False)
        model = get_peft_model(base, config)
        output = output_of(model.get_base_model()(**inputs))
        output.float().square().mean().backward()
        # Experts of images have none in a batch of text.
        gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        return [on_host(tensor.detach()).float() for tensor in (output, *gradients)]

    expected = outputs("cpu")
    with SimulatedDevice(AMPERE):
        found = outputs(DEVICE)
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert (own - other).norm() <= 1e-3 * other.norm().clamp(min=1e-6)


def _moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("card", [HOPPER, AMPERE])
@pytest.mark.parametrize("at_once", [1, 2**28])
@pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kept", [[], [1, 2]], ids=["all in few bits", "some in full precision"])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_in_few_bits_are_decoded_some_at_a_time(bits, kept, size, at_once, card, monkeypatch):
    plain = tiny_model("olmoe", torch.bfloat16)
    quantised = quantize_experts(copy.deepcopy(plain), bits=bits, keep=select_in_all(plain, kept))
    twin = dense_twin(plain, quantised)

    def step(base, device):
        torch.manual_seed(0)
        model = get_peft_model(base, config_for(base, init_weights=False)).to(device)
        tokens = random_tokens(*size).to(device)
        output = model(input_ids=tokens, use_cache=False)[0]
        output.float().square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {name: on_host(own.detach()).float() for name, own in {"output": output, **grads}.items()}

    expected = step(twin, "cpu")
    monkeypatch.setattr(grouped_mm, "_DECODED_BYTES", at_once)
    with SimulatedDevice(card):
        check(step(quantised, DEVICE), expected, TOLERANCES[torch.bfloat16])


def test_layers_on_two_devices_are_never_mixed():
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
    places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    places = {path: f"cuda:{index}" for path, index in places.items()}
    tokens = random_tokens(2, 12)
    expected = tiny_model("olmoe")
    expected = get_peft_model(expected, config_for(expected, inference_mode=True)).eval()
    with SimulatedDevice(AMPERE):
        base = dispatch_model(tiny_model("olmoe"), device_map=places, main_device="cuda:0")
        model = get_peft_model(base, config_for(base))
        model.add_adapter("other", config_for(base, [0, 2], init_weights=False))
        moved = tokens.to("cuda:0")
        model(input_ids=moved, labels=moved).loss.backward()
        delta_devices = {str(p.grad.device) for p in model.parameters() if p.grad is not None}
        assert delta_devices == {"cuda:0", "cuda:1"}
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(on_host(model(input_ids=moved)[0]), expected(input_ids=tokens)[0])
            mixed = model(input_ids=moved, adapter_names=["default", "other"])[0]
            model.base_model.set_adapter("other", inference_mode=True)
            other = model(input_ids=moved)[0]
            torch.testing.assert_close(on_host(mixed)[1], on_host(other)[1], rtol=1e-4, atol=1e-5)
            model.merge_adapter()
            torch.testing.assert_close(on_host(model(input_ids=moved)[0]), on_host(other), rtol=1e-4, atol=1e-5)
            model.unmerge_adapter()
            model.base_model.freeze_adapter("other")
            torch.testing.assert_close(on_host(model(input_ids=moved)[0]), on_host(other), rtol=1e-4, atol=1e-5)


def test_unequal_results_would_be_noticed():
    expected = step("olmoe", torch.float32, FEW, "cpu")
    with pytest.raises(AssertionError):
        check({**expected, "output": expected["output"] * 1.01}, expected, 1e-4)


def test_values_do_not_come_to_the_host_by_themselves():
    with SimulatedDevice(), pytest.raises(TypeError, match="can't convert"):
        torch.ones(2, device=DEVICE).numpy()


def test_the_loss_of_a_step_is_counted_as_a_wait():
    with SimulatedDevice() as device:
        task = task_loss(torch.ones(2, 3)).to(DEVICE)
        device.reset()
        task.item()
        assert sum(device.waits.values()) == 1
