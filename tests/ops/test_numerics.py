"""Dtypes, and numbers of tokens that are not usual, against one expert after another in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy, silu

from peft_esft import ESFTConfig, ESFTLayer

from families import VOCABULARY, tiny_model
from oracle import random_tokens


SELECTED = [5, 1, 6]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def adapted_layer(dtype=torch.float32):
    config = ESFTConfig(target_experts={0: SELECTED}, init_weights=False)
    # The base's own default cannot compute in fp64.
    base = tiny_model("olmoe", dtype, "eager" if dtype == torch.float64 else None)
    model = get_peft_model(base, config)
    (layer,) = (module for module in model.modules() if isinstance(module, ESFTLayer))
    return layer


def deltas_of_layer(layer):
    return [layer.esft_gate_up_proj["default"], layer.esft_down_proj["default"]]


def inputs_for(index, dtype, hidden_size=32):
    generator = torch.Generator().manual_seed(len(index))
    hidden = torch.randn(len(index), hidden_size, generator=generator).to(dtype)
    weights = torch.rand(index.shape, generator=generator).to(dtype)
    return hidden.requires_grad_(), index, weights.requires_grad_()


def reference(layer, hidden, index, weights):
    """One expert after another, in fp64, with the effective rows as the layer rounds them."""
    base = layer.base_layer
    leaves = [delta.detach().double().requires_grad_() for delta in deltas_of_layer(layer)]
    rows = []
    for name, leaf in zip(("gate_up_proj", "down_proj"), leaves, strict=True):
        effective = layer.effective_rows(name, ["default"]).detach().double()
        with_gradient = effective + leaf - leaf.detach()
        rows.append(getattr(base, name).detach().double().index_copy(0, torch.tensor(SELECTED), with_gradient))
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weights))
    output = torch.zeros_like(x)
    for expert in range(base.num_experts):
        tokens, places = (index == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens] @ rows[0][expert].T).chunk(2, -1)
        output = output.index_add(0, tokens, (silu(gate) * up) @ rows[1][expert].T * w[tokens, places, None])
    return output, [x, w, *leaves]


def check(layer, hidden, index, weights):
    tolerance = TOLERANCES[hidden.dtype]
    output = layer(hidden, index, weights)
    expected, leaves = reference(layer, hidden, index, weights)
    assert output.dtype == hidden.dtype and output.shape == hidden.shape
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape, generator=generator).to(output.dtype)
    found = torch.autograd.grad(output, [hidden, weights, *deltas_of_layer(layer)], direction)
    wanted = torch.autograd.grad(expected, leaves, direction.double())
    for a, b in zip([output, *found], [expected, *wanted], strict=True):
        size = b.abs().max().clamp(min=1e-3) if b.numel() else 1.0
        torch.testing.assert_close(a.double() / size, b / size, rtol=0, atol=tolerance)
    return found


def routing(kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "usual":
        return torch.rand(40, 8, generator=generator).topk(2).indices
    experts = {
        "no token": [],
        "one token, selected": [[1, 5]],
        "one token, frozen": [[0, 7]],
        "one token, both": [[1, 7]],
        "all on one selected expert": [[5, 5]] * 30,
        "all on one frozen expert": [[3, 3]] * 30,
        "an expert gets none": [[1, 3], [5, 1], [5, 0]] * 10,
        "only selected": [[1, 5], [6, 5]] * 15,
        "only frozen": [[0, 2], [3, 7]] * 15,
    }[kind]
    return torch.tensor(experts, dtype=torch.int64).reshape(-1, 2)


KINDS = [
    "usual",
    "no token",
    "one token, selected",
    "one token, frozen",
    "one token, both",
    "all on one selected expert",
    "all on one frozen expert",
    "an expert gets none",
    "only selected",
    "only frozen",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_any_dtype_and_any_routing(dtype, kind):
    layer = adapted_layer(dtype)
    index = routing(kind)
    *_, gate_up, down = check(layer, *inputs_for(index, dtype))
    for place, expert in enumerate(SELECTED):
        if expert not in index:
            assert not gate_up[place].any() and not down[place].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_merged_is_unmerged_in_any_dtype(dtype, kind):
    layer = adapted_layer(dtype)
    base = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
    effective = {name: layer.effective_rows(name, ["default"]).detach() for name in layer.weight_names}
    hidden, index, weights = (tensor.detach() for tensor in inputs_for(routing(kind), dtype))
    with torch.no_grad():
        expected = layer(hidden, index, weights)
        layer.merge()
        assert all(torch.equal(getattr(layer.base_layer, n)[SELECTED], rows) for n, rows in effective.items())
        found = layer(hidden, index, weights)
    size = expected.abs().max().clamp(min=1e-3) if len(expected) else 1.0
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=TOLERANCES[dtype])
    layer.unmerge()
    assert all(torch.equal(value, base[name]) for name, value in layer.base_layer.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_thousand_tokens(dtype):
    index = torch.rand(100_000, 8, generator=torch.Generator().manual_seed(2)).topk(2).indices
    check(adapted_layer(dtype), *inputs_for(index, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms_give_the_same_bits_again(dtype):
    layer = adapted_layer(dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (check(layer, *inputs_for(routing("usual"), dtype)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_long_training_on_a_bf16_base_keeps_to_the_fp32_one(record_property):
    """The same base, rounded to bf16, once computed with in fp32; the deltas are fp32 in both."""
    rounded = tiny_model("olmoe", torch.bfloat16)
    config = ESFTConfig(target_experts={0: SELECTED, 1: SELECTED})
    batches = [random_tokens(4, 16, seed) for seed in range(4)]
    losses, deltas = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(copy.deepcopy(rounded).to(dtype), copy.deepcopy(config))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.dtype == torch.float32 for parameter in trained)
        optimizer = torch.optim.AdamW(trained, lr=2e-3)
        history = []
        for step in range(400):
            tokens = batches[step % len(batches)]
            logits = model(input_ids=tokens)[0].float()
            loss = cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        losses[dtype] = [sum(history[:4]) / 4, sum(history[-4:]) / 4]
        deltas[dtype] = torch.cat([parameter.detach().flatten() for parameter in trained])
    (first, exact), (_, half) = losses[torch.float32], losses[torch.bfloat16]
    distance = (deltas[torch.bfloat16] - deltas[torch.float32]).norm() / deltas[torch.float32].norm()
    record_property("first_loss", first)
    record_property("loss_fp32", exact)
    record_property("loss_bf16", half)
    record_property("relative_distance_of_deltas", distance.item())
    print(f"first loss {first:.4f}, fp32 {exact:.4f}, bf16 {half:.4f}, distance of the deltas {distance:.4f}")
    assert exact < 0.7 * first
    assert abs(half - exact) < 0.1 * (first - exact)
