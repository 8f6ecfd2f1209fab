"""Experts in blocks of GGUF, which transformers keeps so: taken over, and trained over as over the dense values."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.integrations.gguf import kernels
from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_IQ4_NL, GGML_NAME, GGML_Q4_0, GGML_Q8_0, dequantize
from transformers.integrations.gguf.utils import GgufExperts, GgufLinear

from peft_esft import ESFTConfig, adopt_quantized_experts, find_experts, quantize_experts
from peft_esft.moe.gguf_linears import give_gradients
from peft_esft.moe.quantised_formats import Gguf

from families import tiny_model
from gguf_files import random_blocks, write_gguf
from oracle import config_for, deltas_of, random_tokens, task_loss
from stored_bases import dense, same_bits


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the kernel from the Hub, without which transformers keeps no weight in blocks."""

    def product(weight: Tensor, rows: Tensor, ggml_type: int, out_features: int) -> Tensor:
        return (rows @ dequantize(weight, ggml_type).view(out_features, -1).T).detach()

    own = SimpleNamespace(supports=lambda _: True, mul_mat_vec=product)
    monkeypatch.setattr(kernels, "_gguf_kernel", own)


def loaded(file: Path, dequantize: bool) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=dequantize),
    ).eval()


@pytest.mark.parametrize("ggml_type", GGML_BLOCK, ids=GGML_NAME.get)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_type_is_what_transformers_dequantises_it_to(ggml_type: int, dtype: torch.dtype) -> None:
    weights, size = GGML_BLOCK[ggml_type]
    torch.manual_seed(0)
    # The largest byte keeps every scale, which is in half precision, finite.
    codes = torch.randint(0x7C, (3, 4, 2 * size), dtype=torch.uint8)
    wanted = dequantize(codes.flatten(), ggml_type, dtype).view(3, 4, 2 * weights)
    form = Gguf(ggml_type)
    for experts in (slice(1, 3), torch.tensor([2, 0])):
        assert same_bits(form.decode({"codes": codes}, experts, (4, 2 * weights), dtype), wanted[experts])
    assert form.name == f"gguf {GGML_NAME[ggml_type]}"
    assert wanted.isfinite().all()


@pytest.mark.parametrize("of_experts", [GGML_Q4_0, GGML_Q8_0, GGML_IQ4_NL], ids=GGML_NAME.get)
def test_training_over_a_file_is_training_over_its_dense_values(tmp_path: Path, kernel: None, of_experts: int) -> None:
    write_gguf(tmp_path / "model.gguf", of_experts)
    packed, twin = (loaded(tmp_path / "model.gguf", dequantize=own) for own in (False, True))
    assert {type(c.module) for c in find_experts(packed).values()} == {GgufExperts}
    assert any(isinstance(module, GgufLinear) for module in packed.modules())
    with pytest.raises(NotImplementedError, match=r"adopt_quantized_experts.*GgufConfig\(dequantize=True\)"):
        get_peft_model(packed, ESFTConfig(target_experts={0: [1]}))
    adopt_quantized_experts(packed)
    plain = find_experts(twin)
    for path, container in find_experts(packed).items():
        for weight in ("gate_up_proj", "down_proj"):
            assert same_bits(dense(container, weight), getattr(plain[path].module, weight).data)
    bytes_of_experts = sum(p.nbytes for c in find_experts(packed).values() for p in c.parameters())
    assert bytes_of_experts < 0.3 * sum(p.nbytes for c in plain.values() for p in c.parameters())

    results, adapted = [], []
    for base in (packed, twin):
        torch.manual_seed(1)
        wrapped = get_peft_model(base, config_for(base, init_weights=False))
        logits = wrapped(input_ids=random_tokens())[0]
        task_loss(logits).backward()
        adapted.append(wrapped)
        results.append((logits, *(delta.grad for delta in deltas_of(wrapped).values())))
    for own, wanted in zip(*results, strict=True):
        # The linear layers around the experts sum in another order.
        assert (own - wanted).norm() < 1e-5 * wanted.norm()

    before = {path: dense(container, "down_proj") for path, container in find_experts(packed).items()}
    adapted[0].merge_adapter()
    assert not all(same_bits(dense(c, "down_proj"), before[path]) for path, c in find_experts(packed).items())
    adapted[0].unmerge_adapter()
    assert all(same_bits(dense(c, "down_proj"), before[path]) for path, c in find_experts(packed).items())


def test_a_few_tokens_have_the_whole_gradient(kernel: None) -> None:
    """transformers' kernel for 8 rows and fewer has none, and its result would count as a constant."""
    torch.manual_seed(0)
    linear = GgufLinear(64, 40, GGML_Q4_0, bias=True)
    linear.weight.data = random_blocks(GGML_Q4_0, (40, 64), torch.Generator().manual_seed(0))
    nn.init.normal_(linear.bias)
    linear.input_permutation = torch.randperm(64)
    theirs = copy.deepcopy(linear)
    give_gradients(nn.Sequential(linear))
    matrix = dequantize(linear.weight.data, GGML_Q4_0).view(40, 64)
    for number in (3, 20):
        rows = torch.randn(2, number, 64, requires_grad=True)
        output = linear(rows)
        torch.testing.assert_close(output, rows[..., linear.input_permutation] @ matrix.T + linear.bias)
        gradient = torch.randn_like(output)
        (own,) = torch.autograd.grad(output, rows, gradient)
        wanted = torch.empty_like(own)
        wanted[..., linear.input_permutation] = gradient @ matrix
        torch.testing.assert_close(own, wanted)
        with torch.no_grad():
            assert same_bits(linear(rows), theirs(rows))
    assert not theirs(torch.randn(2, 64, requires_grad=True)).requires_grad
    for again in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(again) is type(linear) and torch.equal(again(rows), linear(rows))


def test_linear_layers_beside_dense_experts_have_a_gradient_too(kernel: None) -> None:
    results = []
    for in_blocks in (False, True):
        base = tiny_model("olmoe")
        for layer in base.model.layers:
            plain = layer.self_attn.o_proj
            linear = GgufLinear(plain.in_features, plain.out_features, GGML_Q4_0)
            linear.weight.data = random_blocks(GGML_Q4_0, plain.weight.shape, torch.Generator().manual_seed(0))
            plain.weight.data = dequantize(linear.weight.data, GGML_Q4_0).view(plain.weight.shape)
            layer.self_attn.o_proj = linear if in_blocks else plain
        torch.manual_seed(1)
        wrapped = get_peft_model(base, config_for(base, init_weights=False))
        task_loss(wrapped(input_ids=random_tokens(1, 6))[0]).backward()
        results.append([delta.grad for delta in deltas_of(wrapped).values()])
    for own, wanted in zip(*results, strict=True):
        assert (own - wanted).norm() < 1e-5 * wanted.norm()


def test_a_file_that_is_loaded_dense_is_quantised_like_any_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    model = quantize_experts(loaded(tmp_path / "model.gguf", dequantize=True), bits=8)
    assert model.hf_quantizer.is_trainable  # the Trainer asks
    wrapped = get_peft_model(model, config_for(model))
    task_loss(wrapped(input_ids=random_tokens())[0]).backward()
    assert all(delta.grad is not None for delta in deltas_of(wrapped).values())
