"""The split forward against a plain loop over (token, expert) pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_esft.ops import grouped_linear
from peft_esft.ops import grouped_mm as grouped
from peft_esft.ops.deltas import add_deltas, connected, rows_with_delta
from peft_esft.ops.split_forward import ExpertBody, ExpertWeights, default_gate, expert_slots, split_experts_forward


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
def problems(draw, dtypes=(torch.float32, torch.float64)):
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
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 1000)),
    }


@given(problems())
def test_split_forward_equals_the_loop_in_outputs_and_all_gradients(problem):
    check_against_the_loop(problem)


@pytest.mark.parametrize("few_rows", [0, 1000])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_the_ways_of_accelerators_compute_the_same(monkeypatch, has_kernel, few_rows):
    """Few rows go without waiting for the host, many rows in two parts; torch has the kernel on the CPU as well."""
    monkeypatch.setattr(grouped, "_LOOPED_DEVICES", ())
    monkeypatch.setattr(grouped, "has_fast_kernel", lambda *_: has_kernel)
    monkeypatch.setattr(grouped, "_few_rows", lambda *_: few_rows)
    monkeypatch.setattr(grouped, "_FEW_ROWS", few_rows)
    kernel, used = torch.nn.functional.grouped_mm, []
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: used.append(1) or kernel(*a, **k))
    # Memory that a kernel does not write to is then filled with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        given(problems(dtypes=[torch.float32] if has_kernel else [torch.float32, torch.float64]))(
            check_against_the_loop
        )()
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(used) == has_kernel


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
            slots=expert_slots([(ids.tolist(), 0)], 8, 2, 0)[0],
            body=ExpertBody(gate),
        )
        return [output, *torch.autograd.grad(output.float().square().sum(), [*leaves, *deltas])]

    rows = [rows_with_delta(weight, ids, delta) for weight, delta in zip(base, deltas, strict=True)]
    for own, expected in zip(run(deltas, ids), run(rows, None), strict=True):
        assert torch.equal(own, expected)


def test_slots_are_places_of_own_rows_then_ids_and_one_for_all_identity_experts():
    slots = expert_slots([([3, 0], 0), ([], 0), ([1], 4)], num_experts=4, num_rows=5, num_identity_experts=2)
    assert slots.tolist() == [[5, 1, 2, 4, 9, 9], [0, 1, 2, 3, 9, 9], [0, 8, 2, 3, 9, 9]]
    assert slots.dtype == torch.int64


def test_tokens_of_several_adapters_get_what_each_adapter_alone_gives_them():
    """Adapter 0 has the rows of experts 5 and 1, adapter 1 that of 1 alone, adapter 2 none."""
    (states, gates, *rows), index, settings = small_problem()
    rows = [torch.cat([row, torch.randn_like(row[:1])]) for row in rows]
    selections, own_rows = [([5, 1], 0), ([1], 2), ([], 0)], [slice(0, 2), slice(2, 3), slice(0, 0)]
    adapter_of_token = torch.arange(20) % 3
    settings["slots"] = expert_slots(selections, 8, 3, 1)
    output = split_experts_forward(
        states, index, gates, trained=ExpertWeights(*rows), adapter_of_token=adapter_of_token, **settings
    )
    for adapter, ((ids, _), own) in enumerate(zip(selections, own_rows, strict=True)):
        dense = [w.clone() for w in (settings["frozen"].up, settings["frozen"].down)]
        for weight, row in zip(dense, rows, strict=True):
            weight[ids] = row[own]
        expected = loop_forward(states, index, gates, ExpertWeights(*dense), settings["body"])
        here = adapter_of_token == adapter
        torch.testing.assert_close(output[here], expected[here])


def small_problem(dtype=torch.float32, has_bias=False, num_rows=20):
    """Leaves, routing and settings of a split forward: 8 experts, of which 5 and 1 are trained, and an identity."""
    shapes = [(8, 16, 8), (8, 8, 8), *([(8, 16), (8, 8)] if has_bias else [])]
    base = [torch.randn(shape).to(dtype) for shape in shapes]
    leaves = [torch.randn(num_rows, 8).to(dtype), torch.rand(num_rows, 2).to(dtype), *(w[[5, 1]] for w in base)]
    settings = {"slots": expert_slots([([5, 1], 0)], 8, 2, 1)[0], "body": ExpertBody(gate)}
    return leaves, torch.randint(9, (num_rows, 2)), settings | {"frozen": ExpertWeights(*base)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_gradient_of_a_frozen_weight_is_ever_computed(monkeypatch, dtype):
    """Nor is one computed from more rows than those of the trained experts, or the host asked again whose they are."""
    products, gradients = [], []
    mm, outer = grouped_linear.grouped_mm, grouped_linear.grouped_outer
    monkeypatch.setattr(grouped_linear, "grouped_mm", lambda *args: products.append(args) or mm(*args))
    monkeypatch.setattr(
        grouped_linear, "grouped_outer", lambda *args: gradients.append((args, outer(*args))) or gradients[-1][1]
    )
    (states, gates, *rows), index, settings = small_problem(dtype)
    deltas = [torch.zeros(row.shape, requires_grad=True) for row in rows]
    states.requires_grad_()
    output = split_experts_forward(
        states, index, gates, trained=ExpertWeights(*deltas), trained_ids=torch.tensor([5, 1]), **settings
    )
    output.sum().backward()
    counts = [int((index == expert).sum()) for expert in (5, 1)]
    assert len(gradients) == 2
    for (left, right, bounds, host_bounds, _), gradient in gradients:
        assert gradient.dtype == torch.float32 and gradient.shape[0] == 2
        assert left.shape[0] == right.shape[0] == sum(counts)
        assert bounds.tolist() == host_bounds == [0, counts[0], sum(counts)]
    assert len(products) == 4
    for _, _, _, _, ends, host_ends, _ in products:
        assert ends.tolist() == host_ends


@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_do_not_depend_on_which_others_are_asked_for(has_bias):
    leaves, index, settings = small_problem(has_bias=has_bias)

    def gradients(needed):
        own = [leaf.clone().requires_grad_(place in needed) for place, leaf in enumerate(leaves)]
        output = split_experts_forward(own[0], index, own[1], trained=ExpertWeights(*own[2:]), **settings)
        output.square().sum().backward()
        return [leaf.grad for leaf in own]

    everything = gradients(range(len(leaves)))
    assert all(gradient is not None and gradient.any() for gradient in everything)
    for size in range(1, len(leaves)):
        for needed in itertools.combinations(range(len(leaves)), size):
            for place, gradient in enumerate(gradients(needed)):
                assert torch.equal(gradient, everything[place]) if place in needed else gradient is None


def test_rows_are_ordered_on_the_device_that_they_are_on():
    with torch.no_grad():
        order = grouped_linear.order_rows(torch.zeros(5, 2, dtype=torch.int64, device="meta"), 32, torch.float32)
    tensors = [order.pairs, order.tokens, order.places, order.slots, order.ends]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert order.host_ends is None


def test_rows_are_kept_only_for_gradients_that_need_them():
    """Where neither experts nor routing weights are trained, the input's gradient needs no row of any layer."""
    (states, gates, *rows), index, settings = small_problem()
    settings["body"] = ExpertBody(lambda rows: rows[:, :8])
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        leaf = states.requires_grad_()
        split_experts_forward(leaf, index, gates, trained=ExpertWeights(*rows), **settings).sum().backward()
    assert states.grad.any()
    assert not {shape for shape in kept if shape[:1] in ((20,), (40,)) and shape[1:] in ((8,), (16,))}


@pytest.mark.parametrize("has_bias", [False, True])
def test_an_activation_may_compute_in_a_wider_dtype(has_bias):
    (states, gates, *rows), index, settings = small_problem(torch.bfloat16, has_bias)

    def run(activation):
        own = settings | {"body": ExpertBody(activation)}
        return split_experts_forward(states, index, gates, trained=ExpertWeights(*rows), **own)

    wide = run(lambda rows: gate(rows.float()))
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide, run(lambda rows: gate(rows.float()).bfloat16()))


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


@pytest.mark.parametrize("positions", [None, torch.tensor([1, 0, 2])])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_rows_and_deltas_may_differ_in_dtype(dtypes, positions):
    rows, delta = (torch.randn(3, 2, dtype=dtype) for dtype in dtypes)
    order = [0, 1, 2] if positions is None else [1, 0, 2]
    expected = (rows.float() + delta.float()[order]).to(rows.dtype)
    result = add_deltas(rows, [(positions, delta)])
    assert result.dtype == rows.dtype and torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(3, 2), ()])
def test_deltas_without_part_in_an_output_get_a_zero_gradient(shape):
    output = torch.randn(shape, dtype=torch.bfloat16)
    trained, frozen = torch.full((2, 2), torch.inf, requires_grad=True), torch.randn(2, 2)
    joined = connected(output, [trained, frozen])
    assert torch.equal(joined, output) and joined.dtype == output.dtype
    assert torch.equal(connected(-0.0 * output.abs(), [trained]).signbit(), torch.ones(shape, dtype=torch.bool))
    joined.sum().backward()
    assert torch.equal(trained.grad, torch.zeros(2, 2))
    assert connected(output, [frozen]) is output
    with torch.no_grad():
        assert connected(output, [trained]) is output
