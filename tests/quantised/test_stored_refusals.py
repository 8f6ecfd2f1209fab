"""What cannot be quantised, loaded or saved is refused by its name, before anything changes."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_esft import ESFTQuantizationConfig, quantize_experts
from peft_esft.cli.loading import load_base

from families import tiny_model
from oracle import config_for, random_tokens
from stored_bases import same_bits
from zoo import build


FILE = "model.safetensors"
SCALES = "model.layers.0.mlp.experts.stored_in.scales"
CODES = "model.layers.0.mlp.experts.stored_out.codes"


@pytest.mark.parametrize("values", [{"bits": 3}, {"bits": 4, "quant_type": "int8"}, {"bits": 8, "quant_type": "q"}])
def test_unknown_forms_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="bits is 4 or 8"):
        ESFTQuantizationConfig(**values)


@pytest.mark.parametrize("values", [{"bits": 8}, {"quant_type": "mxfp4"}])
def test_scales_of_other_forms_are_not_quantised(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="only the scales of 'nf4' and 'fp4'"):
        ESFTQuantizationConfig(**values, double_quant=True)


@pytest.mark.parametrize("model_type", ["dbrx", "llama4", "switch_transformers", "jetmoe"])
def test_other_layouts_are_refused_by_name(model_type: str) -> None:
    model = build(model_type, torch.bfloat16)
    before = set(model.state_dict())
    with pytest.raises(NotImplementedError, match=r"experts|moe|mlp"):
        quantize_experts(model)
    assert set(model.state_dict()) == before


def test_experts_are_not_quantised_twice_nor_under_an_adapter() -> None:
    model = tiny_model("olmoe", torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape("8 experts, with ids 0 to 7; it has no expert [9]")):
        quantize_experts(model, keep={0: [9]})
    with pytest.raises(ValueError, match="float64"):
        quantize_experts(tiny_model("olmoe", torch.float64))
    quantize_experts(model)
    with pytest.raises(NotImplementedError, match="quantised already"):
        quantize_experts(model, bits=8)
    plain = tiny_model("olmoe", torch.bfloat16)
    wrapped = get_peft_model(plain, config_for(plain))
    with pytest.raises(ValueError, match="has an adapter"):
        quantize_experts(wrapped)


def test_models_without_data_are_refused() -> None:
    with torch.device("meta"):
        model = tiny_model("olmoe", torch.bfloat16)
    with pytest.raises(NotImplementedError, match="not loaded"):
        quantize_experts(model)


def test_shared_experts_are_quantised_in_memory_and_neither_loaded_nor_saved(tmp_path: Path) -> None:
    model = build("diffusion_gemma", torch.bfloat16)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="call quantize_experts"):
        type(model).from_pretrained(tmp_path, quantization_config=ESFTQuantizationConfig())
    with pytest.raises(NotImplementedError, match="cannot be saved"):
        quantize_experts(model).save_pretrained(tmp_path / "stored_bases")


def test_an_adapter_over_shared_experts_is_saved(tmp_path: Path) -> None:
    model = quantize_experts(build("diffusion_gemma", torch.bfloat16))
    model.add_adapter(config_for(model))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_experts_that_differ_in_what_is_kept_are_not_saved_when_offloaded(tmp_path: Path) -> None:
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16))
    stored = model.model.layers[0].mlp.experts.stored_in
    stored.write([3], torch.zeros(1, *stored.shape[1:]))
    before = model(input_ids=random_tokens())[0]
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="Save the model before it is offloaded"):
        model.save_pretrained(tmp_path)
    assert same_bits(model(input_ids=random_tokens())[0], before)


@pytest.mark.parametrize(("has", "asked"), [(8, 4), (4, 8)])
def test_a_checkpoint_in_other_bits_than_the_command_asks_for_is_refused(has: int, asked: int, tmp_path: Path) -> None:
    quantize_experts(tiny_model("olmoe", torch.bfloat16), bits=has).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "device_map": "cpu", "dtype": "auto"}
    with pytest.raises(ValueError, match=rf"has its experts in {has} bits, which --bits {asked} cannot change"):
        load_base(Namespace(**options, bits=asked))
    for bits in (has, None):
        assert load_base(Namespace(**options, bits=bits)).config.quantization_config.bits == has


def damage_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES] = tensors[SCALES].to(torch.bfloat16)


def damage_codes(tensors: dict[str, Tensor]) -> None:
    tensors[CODES] = tensors[CODES].float()


def damage_shape(tensors: dict[str, Tensor]) -> None:
    tensors[CODES] = tensors[CODES][:, :-1].contiguous()


def damage_value(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES][3, 1] = torch.nan


def damage_sign(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES][3, 1] *= -1


def leave_out(tensors: dict[str, Tensor]) -> None:
    del tensors[SCALES]


def mix(tensors: dict[str, Tensor]) -> None:
    tensors[CODES] = tensors[CODES].view(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_dtype, "has dtype torch.bfloat16 in the checkpoint, and not torch.float32"),
        (damage_codes, "has dtype torch.float32 in the checkpoint, and not torch.uint8"),
        (mix, "has dtype torch.int8 in the checkpoint, and not torch.uint8"),
        (damage_shape, "size mismatch|mismatch"),
        (damage_value, "not finite"),
        (damage_sign, "negative scales"),
        (leave_out, f"the checkpoint has no {re.escape(SCALES)}"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    damage(tensors)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 5, "bits is 4 or 8"),
        ("bits", 8, "dtype torch.uint8 in the checkpoint, and not torch.int8"),
        ("keep", {"0": [3]}, "the checkpoint has no .*kept_experts"),
        ("keep", {"7": [3]}, "layer 7 has no experts module"),
        ("keep", {"0": [99]}, "it has no expert"),
        ("keep", {"0": [3, 3]}, "the checkpoint has no .*kept_experts"),
        ("keep", [3], "keep"),
        ("keep", {"0": 3}, "keep"),
        ("bits", "4", "bits is 4 or 8"),
        ("quant_type", None, "bits is 4 or 8"),
        ("double_quant", True, "ignore_mismatched_sizes"),
        ("double_quant", "yes", "double_quant"),
        ("linears", {"load_in_4bit": "yes"}, "load_in_4bit must be a bool"),
    ],
)
def test_configs_that_do_not_fit_the_checkpoint_are_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_config_that_keeps_other_experts_than_the_file_is_refused(bits: int, tmp_path: Path) -> None:
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16), bits=bits, keep={0: [5, 2]})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["keep"] = {"0": [5, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"kept_experts is \[2, 5\] in the checkpoint, and its config keeps \[3, 5\]"):
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("keep", [{}, {"1": [4]}])
def test_a_config_that_keeps_fewer_experts_than_the_file_is_refused(
    keep: dict[str, list[int]], tmp_path: Path
) -> None:
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16), keep={0: [5, 2], 1: [4]})
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["keep"] = keep
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"experts in full precision \(.*kept_experts\) that its config"):
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("keep", [None, {0: [5, 2]}])
def test_nothing_is_missing_in_what_was_saved(keep: dict[int, list[int]] | None, tmp_path: Path) -> None:
    quantize_experts(model := tiny_model("olmoe", torch.bfloat16), keep=keep).save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.state_dict().keys() == model.state_dict().keys() == set(dict(loaded.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_is_loaded_in_another_dtype(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    quantize_experts(model := tiny_model("olmoe", torch.bfloat16), bits=bits, keep={0: [5, 2]}).save_pretrained(
        tmp_path
    )
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype).state_dict()
    cast = nn.Module.to(model, dtype).state_dict()  # transformers refuses `model.half()` of a quantised model
    assert all(same_bits(tensor, cast[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("keep", [None, {0: [5, 2]}])
def test_a_quantised_checkpoint_is_spread_over_devices_and_not_over_the_disk(
    keep: dict[int, list[int]] | None, tmp_path: Path
) -> None:
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16), keep=keep).eval()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(
        ("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu"
    )
    settings = {"offload_folder": str(tmp_path / "disk"), "dtype": torch.bfloat16}
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1\.mlp\.experts\.stored_in was loaded to the disk"):
        type(model).from_pretrained(tmp_path / "model", device_map={**places, "model.layers.1": "disk"}, **settings)
    # The other device is one whose modules accelerate gives hooks, as it does those of several GPUs.
    places |= {"model.layers.1.mlp": "cpu", "model.layers.1.input_layernorm": "disk"}
    rest = ("self_attn", "post_attention_layernorm")
    places |= {f"model.layers.1.{name}": "cpu" for name in rest}
    spread = type(model).from_pretrained(tmp_path / "model", device_map=places, **settings).eval()
    whole = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    assert same_bits(spread(input_ids=random_tokens())[0], whole(input_ids=random_tokens())[0])


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16))
    model.save_pretrained(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    for length in (len(content) - 100, len(content) // 2, 100, 4):
        (tmp_path / FILE).write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_not_quantised(bits: int, value: float, tmp_path: Path) -> None:
    model = tiny_model("olmoe", torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = value
    model.save_pretrained(tmp_path)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj has values that are not finite"):
        quantize_experts(model, bits=bits)
    assert set(model.state_dict()) == before
    with pytest.raises(ValueError, match=r"not finite"):
        type(model).from_pretrained(tmp_path, quantization_config=ESFTQuantizationConfig(bits=bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_that_something_has_cast_are_refused(bits: int) -> None:
    """As FSDP2 does under a policy of mixed precision."""
    model = quantize_experts(tiny_model("olmoe"), bits=bits)
    model(input_ids=random_tokens())
    stored = model.get_submodule("model.layers.0.mlp.experts.stored_out")
    stored.scales = nn.Parameter(stored.scales.detach().to(torch.bfloat16), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"scales of experts in .* were cast from torch.float32 to torch.bfloat16"):
        model(input_ids=random_tokens())


def test_scales_of_8_bits_in_half_precision_are_read_as_they_are(tmp_path: Path) -> None:
    """As checkpoints had them before they were fp32 in all models."""
    model = quantize_experts(tiny_model("olmoe", torch.bfloat16), bits=8)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            assert tensor.dtype == torch.float32
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = model.state_dict()
    assert all(same_bits(tensor, state[name]) for name, tensor in loaded.state_dict().items())
