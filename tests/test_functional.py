"""The split forward against a plain loop over (token, expert) pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_esft import grouped, row_order
from peft_esft.deltas import add_deltas, rows_with_delta
from peft_esft.functional import ExpertBody, ExpertWeights, default_gate, expert_slots, split_experts_forward


def gate(rows: Tensor) -> Tensor:
    return default_gate(torch.nn.functional.silu, rows)


def loop_forward(
    hidden_states: Tensor, index: Tensor, gates: Tensor, weights: ExpertWeights, body: ExpertBody
) -> Tensor:
    """Every pair by itself; ids without weights return their input."""
    rows = []
    for token, experts in enumerate(index.tolist()):
        total = 0 * hidden_states[token]
        for place, expert in enumerate(experts):
            state = hidden_states[token]
            if expert < weights.down.shape[0]:
                up, down = weights.up[expert], weights.down[expert]
                if not body.is_transposed:
                    up, down = up.T, down.T
                state = state @ up + (0 if weights.up_bias is None else weights.up_bias[expert])
                state = body.activation(state[None])[0] @ down
                state = state + (0 if weights.down_bias is None else weights.down_bias[expert])
                if body.post_expert_norm is not None:
                    state = body.post_expert_norm(state[None])[0]
            total = total + state * gates[token, place]
        rows.append(total)
    return torch.stack(rows) if rows else 0 * hidden_states


@st.composite
def problems(draw):
    num_experts = draw(st.integers(1, 6))
    selected = draw(st.permutations(range(num_experts)).map(list))[: draw(st.integers(1, num_experts))]
    return {
        "num_experts": num_experts,
        "selected": selected,
        "num_identity": draw(st.integers(0, 2)),
        "num_tokens": draw(st.integers(0, 9)),
        "top_k": draw(st.integers(1, 4)),
        # Sizes of 4 use the kernel in fp32, others the fallback.
        "hidden": draw(st.sampled_from([3, 4, 8])),
        "intermediate": draw(st.sampled_from([2, 4, 5])),
        "is_transposed": draw(st.booleans()),
        "has_bias": draw(st.booleans()),
        "has_gate": draw(st.booleans()),
        "has_norm": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 1000)),
    }


@given(problems())
def test_split_forward_equals_the_loop_in_outputs_and_all_gradients(problem):
    check_against_the_loop(problem)


@pytest.mark.parametrize("few_rows", [0, 1000])
def test_the_kernels_of_accelerators_compute_the_same(monkeypatch, few_rows):
    """Few rows go without waiting for the host, many rows in two parts; torch has these kernels on the CPU as well."""
    monkeypatch.setattr(grouped, "_LOOPED_DEVICES", ())
    monkeypatch.setattr(grouped, "_FEW_ROWS", few_rows)
    kernel, used = torch.nn.functional.grouped_mm, []
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: used.append(1) or kernel(*a, **k))
    # Memory that a kernel does not write to is then filled with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        given(problems())(check_against_the_loop)()
    finally:
        torch.use_deterministic_algorithms(False)
    assert used


def check_against_the_loop(problem):
    generator = torch.Generator().manual_seed(problem["seed"])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=problem["dtype"])

    experts, hidden, intermediate = problem["num_experts"], problem["hidden"], problem["intermediate"]
    width = intermediate * (2 if problem["has_gate"] else 1)
    shapes = [(experts, width, hidden), (experts, hidden, intermediate)]
    if problem["is_transposed"]:
        shapes = [(first, third, second) for first, second, third in shapes]
    if problem["has_bias"]:
        shapes += [(experts, width), (experts, hidden)]
    base = [random(*shape) for shape in shapes]
    scale = random(hidden)
    body = ExpertBody(
        activation=gate if problem["has_gate"] else torch.nn.functional.silu,
        is_transposed=problem["is_transposed"],
        post_expert_norm=(lambda rows: rows * scale) if problem["has_norm"] else None,
    )
    ids = torch.randint(
        experts + problem["num_identity"], (problem["num_tokens"], problem["top_k"]), generator=generator
    )
    states, gates = random(problem["num_tokens"], hidden), random(*ids.shape)
    selected = torch.tensor(problem["selected"])

    def run(split: bool):
        leaves = [
            tensor.clone().requires_grad_() for tensor in (states, gates, *(weight[selected] for weight in base))
        ]
        rows = leaves[2:]
        if split:
            selection = (problem["selected"], 0)
            slots = expert_slots([selection], experts, len(problem["selected"]), problem["num_identity"])[0]
            output = split_experts_forward(
                leaves[0],
                ids,
                leaves[1],
                trained=ExpertWeights(*rows),
                frozen=ExpertWeights(*base),
                slots=slots,
                body=body,
            )
        else:
            dense = ExpertWeights(*(w.index_copy(0, selected, row) for w, row in zip(base, rows, strict=True)))
            output = loop_forward(leaves[0], ids, leaves[1], dense, body)
        (output * torch.arange(1, 1 + output.numel()).view(output.shape)).sum().backward()
        zeros = [torch.zeros_like(leaf) if leaf.grad is None and not split else leaf.grad for leaf in leaves]
        return output, zeros

    (output, gradients), (expected, expected_gradients) = run(True), run(False)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if problem["dtype"] == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(output, expected, **tolerance)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_deltas_give_what_their_effective_rows_give(dtype, has_bias):
    shapes = [(8, 16, 8), (8, 8, 8), *([(8, 16), (8, 8)] if has_bias else [])]
    base = [torch.randn(shape).to(dtype) for shape in shapes]
    ids, routed = torch.tensor([5, 1]), torch.randint(8, (20, 2))
    deltas = [torch.randn(2, *shape[1:], requires_grad=True) for shape in shapes]
    states, gates = torch.randn(20, 8, dtype=dtype), torch.rand(20, 2, dtype=dtype)

    def run(trained, trained_ids):
        leaves = [states.clone().requires_grad_(), gates.clone().requires_grad_()]
        output = split_experts_forward(
            leaves[0],
            routed,
            leaves[1],
            trained=ExpertWeights(*trained),
            trained_ids=trained_ids,
            frozen=ExpertWeights(*base),
            slots=expert_slots([(ids.tolist(), 0)], 8, 2)[0],
            body=ExpertBody(gate),
        )
        return [output, *torch.autograd.grad(output.float().square().sum(), [*leaves, *deltas])]

    rows = [rows_with_delta(weight, ids, delta) for weight, delta in zip(base, deltas, strict=True)]
    for own, expected in zip(run(deltas, ids), run(rows, None), strict=True):
        assert torch.equal(own, expected)


def test_no_gradient_of_a_frozen_weight_is_ever_computed(monkeypatch):
    computed = []
    original = row_order.grouped_outer
    monkeypatch.setattr(row_order, "grouped_outer", lambda *args: computed.append(original(*args)) or computed[-1])
    for dtype in (torch.float32, torch.float64):
        frozen = ExpertWeights(torch.randn(8, 16, 8, dtype=dtype), torch.randn(8, 8, 8, dtype=dtype))
        trained = ExpertWeights(*(w[:2].clone().requires_grad_() for w in (frozen.up, frozen.down)))
        states = torch.randn(20, 8, dtype=dtype, requires_grad=True)
        index = torch.randint(8, (20, 2))
        slots = expert_slots([((0, 1), 0)], 8, 2)[0]
        body = ExpertBody(gate)
        weights = torch.rand(20, 2, dtype=dtype)
        output = split_experts_forward(states, index, weights, trained=trained, frozen=frozen, slots=slots, body=body)
        output.sum().backward()
    assert len(computed) == 4
    assert {gradient.shape[0] for gradient in computed} == {2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_with_delta_are_those_of_add_deltas(dtype):
    weight, ids = torch.randn(6, 4, 3).to(dtype), torch.tensor([4, 1])
    delta = torch.randn(2, 4, 3, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    rows = rows_with_delta(weight, ids, delta)
    assert torch.equal(rows, add_deltas(weight[ids], [(None, delta)]))
    gradient = torch.randn(rows.shape).to(dtype)
    rows.backward(gradient)
    assert torch.equal(delta.grad, gradient.to(delta.dtype))


def test_deltas_are_added_in_the_wider_dtype_and_rounded_once():
    rows = torch.ones(1, 1, dtype=torch.bfloat16)
    tiny = torch.full((1, 1), 2.0**-9)
    assert add_deltas(rows, [(None, tiny)]) == 1.0
    both = add_deltas(rows, [(None, tiny), (torch.tensor([0]), 2 * tiny)])
    assert both.dtype == torch.bfloat16
    assert both == 1.0 + 2.0**-7
