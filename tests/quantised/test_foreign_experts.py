"""Experts that other packages keep in few bits: taken over as they are, refused by name, or noticed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8Experts, _dequantize_fp8_weight

from peft_esft import ESFTConfig, ESFTQuantizationConfig, adopt_quantized_experts, find_experts, quantize_experts
from peft_esft.interchange.base import Base

from families import tiny_model
from oracle import config_for, deltas_of, random_tokens, task_loss
from stored_bases import dense, dense_twin, same_bits
from zoo import build, fill


def aligned(family: str = "olmoe") -> PreTrainedModel:
    """A tiny model whose rows are whole blocks: with others bitsandbytes' kernel for the CPU reads wrong scales."""
    name, sizes = {
        "olmoe": ("Olmoe", {"intermediate_size": 64, "num_experts": 8}),
        "gpt_oss": ("GptOss", {"intermediate_size": 64, "num_local_experts": 8, "head_dim": 16}),
    }[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=torch.bfloat16)
    fill(model)
    return model.eval()


def parametrized(model: PreTrainedModel, **settings: object) -> PreTrainedModel:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for container in find_experts(model).values():
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(container.module, name, **settings)
    return model


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize(
    "settings", [{}, {"compress_statistics": True}, {"quant_type": "fp4"}], ids=["nf4", "double", "fp4"]
)
def test_parametrized_experts_are_taken_over_bit_for_bit(family: str, settings: dict[str, object]) -> None:
    plain = aligned(family)
    model = parametrized(copy.deepcopy(plain), **settings)
    tokens = random_tokens()
    with torch.no_grad():
        before = model(input_ids=tokens)[0]
    with pytest.raises(NotImplementedError, match=r"adopt_quantized_experts\(model\)"):
        get_peft_model(model, ESFTConfig(target_experts={0: [1]}))
    wanted = {p: [getattr(c.module, n) for n in ("gate_up_proj", "down_proj")] for p, c in find_experts(model).items()}
    adopt_quantized_experts(model)
    for path, container in find_experts(model).items():
        own = [dense(container, name) for name in ("gate_up_proj", "down_proj")]
        assert all(map(same_bits, own, wanted[path]))
    with torch.no_grad():
        assert same_bits(model(input_ids=tokens)[0], before)
    gradients = []
    for base in (model, dense_twin(plain, model)):
        wrapped = get_peft_model(base, config_for(base))
        task_loss(wrapped(input_ids=tokens)[0]).backward()
        gradients.append({key: delta.grad for key, delta in deltas_of(wrapped).items()})
    assert all(same_bits(gradient, gradients[1][key]) for key, gradient in gradients[0].items())


def test_experts_that_cannot_be_taken_over_are_refused_and_nothing_changes() -> None:
    model = parametrized(tiny_model("olmoe", torch.bfloat16), blocksize=4096)
    with pytest.raises(NotImplementedError, match="blocks of 4096 weights belong to two experts"):
        adopt_quantized_experts(model)
    whole = tiny_model("deepseek_v3", torch.bfloat16)
    whole.config.num_experts = 8
    whole.model.layers[1].mlp.experts = FP8Experts(whole.config, block_size=None)
    with pytest.raises(NotImplementedError, match="one scale per matrix"):
        adopt_quantized_experts(whole)
    mixed = parametrized(aligned())
    mixed.model.layers[1].mlp.experts = whole.model.layers[1].mlp.experts
    kinds = [type(container.module) for container in find_experts(mixed).values()]
    with pytest.raises(NotImplementedError, match=r"layers.1.mlp.experts.*one scale per matrix"):
        adopt_quantized_experts(mixed)
    assert [type(container.module) for container in find_experts(mixed).values()] == kinds


def fp8_experts(plain: nn.Module, config: object, block: tuple[int, int]) -> nn.Module:
    """transformers' own module, filled with a plain module's weights in fp8."""
    experts = FP8Experts(config, block_size=block)
    for name in ("gate_up_proj", "down_proj"):
        scales, rows = getattr(experts, f"{name}_scale_inv"), getattr(plain, name).detach().float()
        scales.data = torch.rand(scales.shape) * 0.01 + 0.005
        full = scales.data
        if block is not None:
            full = full.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[
                :, : rows.shape[1], : rows.shape[2]
            ]
        getattr(experts, name).data = (rows / full).clamp(-448, 448).to(torch.float8_e4m3fn)
    return experts


@pytest.mark.parametrize("block", [(8, 8), (16, 12)], ids=str)
def test_fp8_experts_are_what_transformers_dequantises_them_to(block: tuple[int, int]) -> None:
    plain = tiny_model("deepseek_v3", torch.bfloat16)
    plain.config.num_experts = 8
    model = copy.deepcopy(plain)
    experts = model.model.layers[1].mlp.experts = fp8_experts(plain.model.layers[1].mlp.experts, plain.config, block)
    stored = {
        name: (getattr(experts, name), getattr(experts, f"{name}_scale_inv")) for name in ("gate_up_proj", "down_proj")
    }
    adopt_quantized_experts(model)
    (container,) = find_experts(model).values()
    for name, (codes, scales) in stored.items():
        wanted = _dequantize_fp8_weight(codes.data, scales.data, block, torch.bfloat16)
        assert same_bits(dense(container, name), wanted)
    outputs = []
    for base in (model, dense_twin(plain, model)):
        torch.manual_seed(1)
        wrapped = get_peft_model(base, config_for(base, init_weights=False))
        outputs.append(wrapped(input_ids=random_tokens())[0])
        task_loss(outputs[-1]).backward()
    assert same_bits(*outputs)
    wrapped.merge_adapter()


def test_an_adopted_model_is_not_saved(tmp_path: Path) -> None:
    model = adopt_quantized_experts(parametrized(tiny_model("olmoe", torch.bfloat16)))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no experts that another package has quantised"):
        adopt_quantized_experts(tiny_model("olmoe"))


def test_tensors_of_other_packages_are_refused_by_name() -> None:
    """torchao's quantised tensors say that they are bfloat16; so does this one of torch's own."""
    model = tiny_model("olmoe", torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    weight = experts.down_proj.data
    experts.down_proj = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.experts.down_proj is a TwoTensor"):
        get_peft_model(model, ESFTConfig(target_experts={0: [1]}))
    with pytest.raises(NotImplementedError, match="TwoTensor"):
        quantize_experts(model)


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_lists_of_experts_in_4_bits_are_refused_by_name(family: str, tmp_path: Path) -> None:
    build(family, torch.bfloat16).save_pretrained(tmp_path)
    model = type(build(family)).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    path = next(iter(find_experts(model)))
    with pytest.raises(NotImplementedError, match=rf"{path}\.\w+ has dtype torch.uint8, a quantised form"):
        get_peft_model(model, ESFTConfig(target_experts={path: [1]}))
    with pytest.raises(NotImplementedError, match=f"{path}.*only such experts can be quantised"):
        quantize_experts(model)


class Packed(nn.Module):
    """A linear layer that has its weights in buffers, as those of GPTQ and AWQ."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(width // 8, out, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, out))


def test_lists_of_packed_modules_are_refused_with_the_name_of_their_form() -> None:
    model = tiny_model("olmoe")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.ModuleDict({"up_proj": Packed(32, 24)}) for _ in range(8)])
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    for call in (lambda: get_peft_model(model, ESFTConfig(target_experts={0: [1]})), lambda: Base(model)):
        with pytest.raises(ValueError, match=r"quantised \(gptq\).*quantize_experts\(model\)"):
            call()


def loaded(folder: Path, config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens())[0]


def test_linear_layers_are_quantised_beside_the_experts_and_nothing_is_left_in_silence(tmp_path: Path) -> None:
    aligned().save_pretrained(tmp_path / "plain")
    linears = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    alone = loaded(tmp_path / "plain", linears)
    with pytest.warns(UserWarning, match=r"experts of 2 layers were not: they take [\d.e-]+ GB.*quantize_experts"):
        get_peft_model(copy.deepcopy(alone), config_for(alone))
    quantize_experts(alone)
    both = loaded(tmp_path / "plain", ESFTQuantizationConfig(bits=4, linears=linears))
    assert type(both.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert same_bits(logits(both), logits(alone))
    both.save_pretrained(tmp_path / "stored_bases")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stored_bases")
    assert same_bits(logits(again), logits(both))
    assert isinstance(get_peft_model(again, config_for(again)), PeftModel)


def test_merged_experts_are_saved_in_full_precision(tmp_path: Path) -> None:
    model = quantize_experts(aligned())
    wrapped = get_peft_model(model, config_for(model, init_weights=False))
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert again.config.quantization_config.keep == {path: [1, 5, 6] for path in find_experts(again)}
    assert same_bits(logits(again), expected)
