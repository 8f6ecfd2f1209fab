"""gpt-oss' checkpoints, whose experts are in MXFP4: loaded as they are, trained over, and saved."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    PreTrainedModel,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from peft_esft import ESFTQuantizationConfig, find_experts, quantize_experts
from peft_esft.cli.loading import load_base
from peft_esft.cli.main import main
from peft_esft.cli.train_options import TrainOptions, parse
from peft_esft.cli.training_memory import training_setup
from peft_esft.moe.quantised_formats import MXFP4
from peft_esft.moe.stored_rows import StoredRows
from peft_esft.scoring.model_sizes import ModelSizes

from families import tiny_model
from oracle import config_for, deltas_of, random_tokens, task_loss
from stored_bases import dense, same_bits


FILE = "model.safetensors"
SCALES = "model.layers.0.mlp.experts.gate_up_proj_scales"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as OpenAI's are: blocks and scales of the experts, all else in bf16, a config that says mxfp4."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    _write(folder)
    return folder


def _write(folder: Path) -> None:
    config = tiny_model("gpt_oss").config
    config.intermediate_size = 64
    torch.manual_seed(0)
    model = GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tensors = load_file(folder / FILE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 126, (experts, out, width // 32), dtype=torch.uint8)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    _edit_config(folder, {"quantization_config": Mxfp4Config().to_dict()})


def _edit_config(folder: Path, changes: dict[str, object]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(folder: Path, **settings: object) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    quantization = ESFTQuantizationConfig(quant_type="mxfp4", **settings)
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, quantization_config=quantization
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens())[0]


def dequantised(folder: Path) -> PreTrainedModel:
    """transformers' own: the model in bf16."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )


def test_training_over_the_checkpoint_equals_that_over_what_transformers_dequantises(checkpoint: Path) -> None:
    model, plain = load(checkpoint), dequantised(checkpoint)
    for path, container in find_experts(plain).items():
        own = find_experts(model)[path]
        for name in ("gate_up_proj", "down_proj"):
            assert same_bits(dense(own, name), getattr(container.module, name).data)
        assert sum(p.nbytes for p in own.module.parameters()) < 0.35 * sum(p.nbytes for p in container.parameters())
    assert same_bits(logits(model), logits(plain))
    results = []
    for base in (model, plain):
        torch.manual_seed(1)
        wrapped = get_peft_model(base, config_for(base, init_weights=False))
        task_loss(wrapped(input_ids=random_tokens())[0]).backward()
        gradients = {key: delta.grad for key, delta in deltas_of(wrapped).items()}
        before = logits(wrapped)
        wrapped.merge_adapter()
        assert same_bits(logits(wrapped), before)
        wrapped.unmerge_adapter()
        with wrapped.disable_adapter():
            results.append((gradients, before, logits(wrapped)))
    assert all(same_bits(gradient, results[1][0][key]) for key, gradient in results[0][0].items())
    assert all(map(same_bits, results[0][1:], results[1][1:]))


def test_it_is_saved_and_loaded_again_with_merged_experts_in_full_precision(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "stored")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert same_bits(logits(again), logits(model))
    wrapped = get_peft_model(again, config_for(again, init_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    over_plain = PeftModel.from_pretrained(dequantised(checkpoint), tmp_path / "adapter")
    assert same_bits(logits(over_plain), expected)


@given(
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), low=st.booleans()
)
def test_each_matrix_is_transformers_own_for_any_bytes(seed: int, dtype: torch.dtype, low: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0 if low else 100, 255, (3, 6, 2), dtype=torch.uint8, generator=generator)
    wanted = convert_moe_packed_tensors(codes, scales, dtype=dtype)
    tensors = {"codes": codes, "scales": scales}
    for experts in (slice(0, 3), slice(1, 2), torch.tensor([2, 0])):
        found = MXFP4().decode(tensors, experts, (64, 6), dtype)
        assert found.is_contiguous() and same_bits(found, wanted[experts])


def cut_blocks(tensors: dict[str, Tensor]) -> None:
    name = SCALES.replace("scales", "blocks")
    tensors[name] = tensors[name][:, :-1].contiguous()


def no_exponent(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES][1, 2, 0] = 255


def no_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[SCALES]


def other_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES] = tensors[SCALES].to(torch.int32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_blocks, "mismatch"),
        (no_exponent, "exponents that stand for no number"),
        (no_scales, "the checkpoint has no model.layers.0.mlp.experts.stored_in.scales"),
        (other_dtype, "in the checkpoint, and not torch.uint8"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    _write(tmp_path)
    tensors = load_file(tmp_path / FILE)
    damage(tensors)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(tmp_path)


def test_other_experts_and_other_uses_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    tiny_model("olmoe", torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"OlmoeExperts\) cannot be loaded in MXFP4"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ESFTQuantizationConfig(quant_type="mxfp4"))
    with pytest.raises(ValueError, match="cannot be quantised to mxfp4"):
        quantize_experts(tiny_model("gpt_oss", torch.bfloat16), quant_type="mxfp4")
    with pytest.raises(ValueError, match="only in MXFP4"):
        load(checkpoint, keep={0: [1]})
    with pytest.raises(NotImplementedError, match="Leave linears out"):
        load(checkpoint, linears=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="quant_type is one of"):
        ESFTQuantizationConfig(bits=8, quant_type="mxfp4")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_four_bits_on_the_command_line_are_those_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(Namespace(model=str(checkpoint), dtype="bfloat16", device_map=None, bits=4))
    assert {module.format.name for module in base.modules() if isinstance(module, StoredRows)} == {"mxfp4"}
    assert torch.equal(logits(base), logits(dequantised(checkpoint)))
    sizes = ModelSizes.of(base)
    own, settings = parse(TrainOptions, ["MODEL", "DATA", "--out", str(tmp_path / "out"), "--bits", "4"])
    assert training_setup(own, settings, sizes, tokens=8, element=2).base == "mxfp4"

    model = get_peft_model(base, config_for(base, init_weights=False))
    model.save_pretrained(tmp_path / "law")
    assert main(["verify", str(checkpoint), str(tmp_path / "law"), "--bits", "4", "--dtype", "bfloat16"]) == 0, (
        capsys.readouterr().out
    )
