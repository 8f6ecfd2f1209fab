"""What a GPU computes beside what the CPU computes; skipped where torch sees no GPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_esft import AdapterPool, quantize_experts

from families import FAMILIES, tiny_model
from oracle import config_for, random_tokens
from stored_bases import dense_twin
from zoo import VARIANTS, build, inputs_for, model_types, output_of


sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from reporting import host_waits


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

DEVICE = "cuda"
FEW, MANY = (2, 1), (12, 60)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.fixture(autouse=True)
def _full_precision():
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = False


def adapted(family="olmoe", dtype=torch.bfloat16, **settings):
    """A tiny model on the GPU with three adapters, of which "default" is active."""
    torch.manual_seed(0)
    base = tiny_model(family, dtype).to(DEVICE)
    model = get_peft_model(base, config_for(base, init_weights=False, **settings))
    for place, name in enumerate(("a", "b")):
        model.add_adapter(name, config_for(base, [place, 7], init_weights=False, **settings))
    return model.eval()


def run(model, size=MANY, **kwargs):
    with torch.no_grad():
        return model(input_ids=random_tokens(*size).to(DEVICE), use_cache=False, **kwargs)[0]


def training_step(model, size, device):
    """The output and all gradients of a training step, and the output without gradients, as fp32 on the CPU."""
    model = model.to(device)
    tokens = random_tokens(*size).to(device)
    output = model.get_base_model()(input_ids=tokens)[0]
    (output.float() * torch.linspace(-1, 1, output.shape[-1], device=device)).mean().backward()
    with torch.no_grad():
        inference = model.get_base_model()(input_ids=tokens)[0]
    results = {"output": output, "inference": inference}
    results |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: tensor.detach().cpu().float() for name, tensor in results.items()}


def check(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        error = (tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)
        assert error <= tolerance, (name, error)


def waits_in(call):
    """How often the host waits in a second call."""
    call()
    return host_waits(call)


@pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_of_all_families(family, size):
    torch.manual_seed(0)
    base = tiny_model(family, torch.float32)
    model = get_peft_model(base, config_for(base, init_weights=False))
    expected = training_step(copy.deepcopy(model), size, "cpu")
    check(training_step(model, size, DEVICE), expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral"])
def test_a_step_in_bf16(family, size):
    def step(dtype, device):
        base = tiny_model(family, dtype)
        torch.manual_seed(0)
        return training_step(get_peft_model(base, config_for(base, init_weights=False)), size, device)

    exact, host, device = step(torch.float32, "cpu"), step(torch.bfloat16, "cpu"), step(torch.bfloat16, DEVICE)
    for name, own in device.items():
        # Rounding sends some tokens to other experts, here and there to different ones.
        assert (own - exact[name]).norm() <= 1.5 * (host[name] - exact[name]).norm() + 0.01 * exact[name].norm(), name


@pytest.mark.filterwarnings("ignore:.*each training step computes the weights of all:UserWarning")
@pytest.mark.parametrize("model_type", [*model_types(), *VARIANTS])
def test_all_architectures_run_and_train(model_type):
    host = build(model_type)
    torch.manual_seed(0)
    host = get_peft_model(host, config_for(host, [0, 1], init_weights=False))
    device = copy.deepcopy(host).to(DEVICE)
    inputs = inputs_for(host.get_base_model())

    def outputs(model, place):
        moved = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        output = output_of(model.get_base_model()(**moved))
        output.float().square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        return [tensor.detach().cpu().float() for tensor in (output, *gradients)]

    expected, found = outputs(host, "cpu"), outputs(device, DEVICE)
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert (own - other).norm() <= 1e-3 * other.norm().clamp(min=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_and_unmerging_leave_every_bit(dtype):
    model = adapted(dtype=dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unmerged = run(model)
    model.merge_adapter(safe_merge=True)
    merged = run(model)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(merged, unmerged, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_is_what_each_adapter_gives_alone(dtype, size):
    model = adapted(dtype=dtype)
    names = (["default", "a", "b", "__base__"] * size[0])[: size[0]]
    mixed = run(model, size, adapter_names=names)
    for name in set(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = run(model, size)
        else:
            model.set_adapter(name)
            alone = run(model, size)
        own = [row for row, other in enumerate(names) if other == name]
        error = (mixed[own] - alone[own]).float().norm() / alone[own].float().norm()
        assert error <= TOLERANCES[dtype]


def test_frozen_adapters_compute_what_live_ones_do():
    model = adapted()
    live = run(model)
    model.base_model.freeze_adapter("default")
    assert torch.equal(run(model), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_and_switching_do_not_wait(dtype):
    model = adapted(dtype=dtype)
    model.base_model.set_adapter("default", inference_mode=True)
    tokens = random_tokens(*FEW).to(DEVICE)

    def decode(**kwargs):
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False, **kwargs)

    with torch.no_grad():
        base = waits_in(lambda: model.get_base_model().model(input_ids=tokens, use_cache=False))
    assert waits_in(decode) <= base
    assert waits_in(lambda: model.base_model.set_adapter("a", inference_mode=True)) == 0
    with model.base_model.hold():
        assert waits_in(decode) <= base


def test_a_training_step_waits_once_a_layer():
    model = adapted().train()
    tokens = random_tokens(*MANY).to(DEVICE)

    def step(trained):
        trained(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    plain = tiny_model("olmoe", torch.bfloat16, experts_implementation="grouped_mm").to(DEVICE).train()
    base = waits_in(lambda: step(plain))
    assert waits_in(lambda: step(model)) <= base + model.config.num_hidden_layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
def test_generate_with_a_static_cache():
    model = adapted(dtype=torch.float32, task_type="CAUSAL_LM")
    tokens = random_tokens(2, 5).to(DEVICE)
    settings = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 8}
    expected = model.generate(**settings, do_sample=False)
    found = model.generate(**settings, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])
def test_a_quantised_base_is_its_dequantised_one(bits, size):
    plain = tiny_model("olmoe", torch.bfloat16).to(DEVICE)
    quantised = quantize_experts(copy.deepcopy(plain), bits=bits)
    dense = dense_twin(plain, quantised)
    results = []
    for base in (quantised, dense):
        torch.manual_seed(1)
        results.append(training_step(get_peft_model(base, config_for(base, init_weights=False)), size, DEVICE))
    check(*results, 0.02)


def test_saved_from_the_gpu_and_loaded_there(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe", torch.bfloat16).to(DEVICE), tmp_path).eval()
    assert torch.equal(run(loaded), run(model))


def test_a_pool_serves_what_the_adapter_computes(tmp_path):
    model = adapted()
    model.set_adapter("a")
    expected = run(model)
    model.save_pretrained(tmp_path)
    served = adapted()
    pool = AdapterPool(served, device_bytes=10**8)
    pool.add("law", tmp_path / "a")
    with pool.using("law") as names:
        assert torch.equal(run(served, adapter_names=names * MANY[0]), expected)
    pool.close()
