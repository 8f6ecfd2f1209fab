"""The ways of accelerators, taken on the CPU in the dtypes that GPUs run, and decoding as one compiled graph."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import StaticCache

from peft_esft.ops import grouped_mm

from families import tiny_model
from oracle import config_for, random_tokens


TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.fixture(params=[True, False], ids=["kernel", "no kernel"])
def accelerator(request, monkeypatch):
    """An accelerator with or without a fast kernel."""
    monkeypatch.setattr(grouped_mm, "_LOOPED_DEVICES", ())
    monkeypatch.setattr(grouped_mm, "has_fast_kernel", lambda *_: request.param)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("few_rows", [0, 40])
@pytest.mark.parametrize("num_trained", [0, 2, 200])
def test_products_in_the_dtypes_of_gpus(accelerator, monkeypatch, dtype, few_rows, num_trained):
    """Where there are more matrices than rows, those of each row are gathered."""
    monkeypatch.setattr(grouped_mm, "_few_rows", lambda *_: few_rows)
    monkeypatch.setattr(grouped_mm, "_FEW_ROWS", few_rows)
    rows = torch.randn(40, 16).to(dtype)
    frozen, trained = torch.randn(4, 24, 16).to(dtype), torch.randn(num_trained, 24, 16).to(dtype)
    slots = torch.randint(4 + num_trained, (37,)).sort().values
    ends = torch.searchsorted(slots, torch.arange(4 + num_trained), right=True, out_int32=True)
    host_ends = None if few_rows else ends.tolist()
    result = grouped_mm.grouped_mm(rows, None, frozen, trained, ends, host_ends, True)
    matrices = torch.cat([frozen, trained])[slots].float()
    expected = torch.einsum("rh,rih->ri", rows[:37].float(), matrices)
    assert result.dtype == dtype and not result[37:].any()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(result[:37].float(), expected, rtol=tolerance, atol=tolerance * 10)
    if not num_trained:
        return
    bounds = ends[3:]
    host_bounds = None if few_rows else bounds.tolist()
    if few_rows == 0:
        bounds = bounds - bounds[0]
        start = host_bounds[0]
        host_bounds = [end - start for end in host_bounds]
        rows, result = rows[start:37], result[start:37]
    outer = grouped_mm.grouped_outer(result, rows, bounds, host_bounds, torch.float32)
    for group, (start, end) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:], strict=False)):
        own = result[start:end].float().T @ rows[start:end].float()
        torch.testing.assert_close(outer[group], own, rtol=tolerance, atol=tolerance * 20)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [2, 6])
def test_decoding_with_a_static_cache_is_one_graph(accelerator, num_rows, dtype):
    """What `generate(cache_implementation="static")` compiles by itself on a GPU, for three adapters of one size."""
    base = tiny_model("olmoe", dtype)
    experts = {"first": [1, 5, 6], "second": [0, 2, 7], "third": [6, 1, 3]}
    model = get_peft_model(base, config_for(base, experts["first"], init_weights=False), adapter_name="first").eval()
    for name in ("second", "third"):
        model.add_adapter(name, config_for(base, experts[name], init_weights=False))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = model.get_base_model()
    compiled = torch.compile(plain.forward, fullgraph=True, backend=backend)
    tokens = random_tokens(num_rows, 8)
    logits = []
    for name in experts:
        model.base_model.set_adapter(name, inference_mode=True)
        caches = [StaticCache(config=base.config, max_cache_len=32) for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                plain(tokens, position_ids=torch.arange(8).expand(num_rows, -1), past_key_values=cache)
            for step in range(20):
                position = torch.full((num_rows, 1), 8 + step)
                calls = zip((plain, compiled), caches, strict=True)
                expected, found = (
                    call(tokens[:, :1], position_ids=position, past_key_values=cache).logits for call, cache in calls
                )
                torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=2e-2)
        logits.append(found)
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op in ("call_function", "call_method")]
    assert not {"item", "tolist", "nonzero"}.intersection(names)
    operators = [name for name in names if name.startswith("peft_esft.")]
    # Of four pairs, the products are fused. Twelve are more than half as many as there are matrices.
    expected_operator = "peft_esft.few_rows_mm" if grouped_mm.has_fast_kernel(None, None) else "peft_esft.grouped_mm"
    assert operators == ([] if num_rows == 2 else 4 * [expected_operator])  # two products in each of two layers


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_trained", [0, 3])
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("is_flipped", [True, False])
def test_fused_products_of_few_rows(monkeypatch, is_flipped, gathers, num_trained, dtype, backend):
    monkeypatch.setattr(grouped_mm, "_LOOPED_DEVICES", ())
    inputs, tokens = torch.randn(6, 16).to(dtype), torch.tensor([3, 0, 5, 5, 1]) if gathers else None
    shape = (24, 16) if is_flipped else (16, 24)
    frozen, trained = torch.randn(9, *shape).to(dtype), torch.randn(num_trained, *shape).to(dtype)
    slots = torch.randint(9 + num_trained, (5,)).sort().values
    ends = torch.searchsorted(slots, torch.arange(9 + num_trained), right=True, out_int32=True)
    multiply = torch.compile(grouped_mm.grouped_mm, fullgraph=True, backend=backend)
    result = multiply(inputs, tokens, frozen, trained, ends, None, is_flipped)
    rows = inputs if tokens is None else inputs[tokens]
    matrices = torch.cat([frozen, trained])[slots].float()
    matrices = matrices.transpose(1, 2) if is_flipped else matrices
    expected = torch.bmm(rows[:5, None].float(), matrices)[:, 0]
    assert result.dtype == dtype and not result[5:].any()
    torch.testing.assert_close(result[:5].float(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * 10)


def test_what_may_wait_stays_out_of_cuda_graphs():
    operators = torch.ops.peft_esft
    for operator in (operators.grouped_mm.default, operators.grouped_outer.default):
        assert torch.Tag.cudagraph_unsafe in operator.tags
    assert torch.Tag.cudagraph_unsafe not in operators.few_rows_mm.default.tags


def test_few_rows_are_those_whose_matrices_take_less_than_half_of_the_layers():
    assert grouped_mm._few_rows(False, 70) == 35
    assert grouped_mm._few_rows(True, 70) == 1024
