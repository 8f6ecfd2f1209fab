"""Tests that PEFT knows the tuner from outside, and the errors of configs and models that do not fit."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils.hotswap import hotswap_adapter

import peft_esft
from peft_esft import ESFTConfig, ESFTModel, find_experts
from peft_esft.registration import register

from families import tiny_model
from oracle import config_for, deltas_of, random_tokens, select_in_all


def test_the_enum_member_is_like_peft_s_own():
    member = PeftType.ESFT
    assert member is PeftType("ESFT") is PeftType["ESFT"]
    assert (member.name, member.value, str.__str__(member)) == ("ESFT", "ESFT", "ESFT")
    assert member in list(PeftType) and isinstance(member, PeftType)
    assert hash(member) == hash("ESFT") and member == "ESFT"
    assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member))
    assert len(PeftType) == len(set(PeftType))


def test_every_type_of_peft_is_still_mapped():
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) == set(PeftType)
    assert PEFT_TYPE_TO_TUNER_MAPPING["ESFT"] is ESFTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["ESFT"] == ESFTModel.prefix == "esft_"


def test_registering_again_does_nothing_and_a_foreign_tuner_is_an_error():
    register(ESFTConfig, ESFTModel)
    importlib.import_module("peft_esft")

    class Foreign(ESFTModel):
        pass

    with pytest.raises(RuntimeError, match="already knows an ESFT tuner"):
        register(ESFTConfig, Foreign)
    assert PEFT_TYPE_TO_TUNER_MAPPING["ESFT"] is ESFTModel


@pytest.fixture(scope="module")
def printed_by_peft():
    """PEFT imports bitsandbytes where it is installed, which may say that a kernel is missing."""
    return subprocess.run([sys.executable, "-c", "import peft"], capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(
    "code",
    [
        "import peft_esft, peft; print(peft.PeftType.ESFT.value)",
        "import peft, peft_esft; print(peft.utils.PeftType('ESFT').value)",
        "import sys, peft, peft_esft; assert 'matplotlib' not in sys.modules; print('ESFT')",
    ],
)
def test_import_in_a_fresh_process_is_as_quiet_as_peft_s(code, printed_by_peft):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("ESFT\n", printed_by_peft)


def test_a_pickled_config_registers_the_tuner_in_a_fresh_process(tmp_path):
    config = ESFTConfig(target_experts={0: [1]})
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'config')!r}, 'rb')).target_experts)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "{'0': [1]}\n"


def test_public_names():
    assert all(hasattr(peft_esft, name) for name in peft_esft.__all__)
    assert peft_esft.__all__ == sorted(peft_esft.__all__)


@pytest.mark.parametrize(
    ("target_experts", "message"),
    [
        (None, "target_experts is empty"),
        ({}, "target_experts is empty"),
        ({9: [0]}, "layer 9 has no experts module; the layers that have one are [0, 1]"),
        ({"model.layers.0.mlp": [0]}, "'model.layers.0.mlp' is not the path of an experts module"),
        ({0: [1, 8, 99]}, "model.layers.0.mlp.experts has 8 experts, with ids 0 to 7; it has no expert [8, 99]"),
        ({0: [1], "model.layers.0.mlp.experts": [2]}, "names model.layers.0.mlp.experts twice"),
    ],
)
def test_a_selection_that_does_not_fit_the_model_is_refused_and_nothing_is_changed(target_experts, message):
    base = tiny_model("olmoe")
    before = str(base)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(base, ESFTConfig(target_experts=target_experts))
    assert str(base) == before
    model = get_peft_model(base, config_for(base))
    before = str(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.add_adapter("second", ESFTConfig(target_experts=target_experts))
    assert str(model) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("target_experts", "message"),
    [
        ([0, 1], "is a list; expected a dict"),
        ({0: []}, "target_experts[0] is empty"),
        ({0: [1, 2, 1]}, "target_experts[0] repeats the expert ids [1]"),
        ({0: [-1]}, "holds -1; expert ids are integers of at least 0"),
        ({0: [1.5]}, "holds 1.5"),
        ({0: [True]}, "holds True"),
        ({0: ["1"]}, "holds '1'"),
        ({0: 3}, "target_experts[0] is 3; expected a list"),
        ({0: "12"}, "expected a list"),
        ({0.5: [1]}, "has the key 0.5"),
        ({0: [1], "0": [2]}, "names 0 twice"),
    ],
)
def test_malformed_selections_are_refused(target_experts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ESFTConfig(target_experts=target_experts)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers_pattern": "layers"}, ValueError, "layers_pattern has no effect without layers_to_transform"),
        ({"layers_to_transform": [7]}, ValueError, "exclude all 2 selected modules"),
        ({"exclude_modules": ["experts"]}, ValueError, "exclude all 2 selected modules"),
        ({"rank": 0}, ValueError, r"rank is 0; expected a positive integer"),
        ({"rank": True}, ValueError, r"rank is True \(bool\); expected int \| None"),
        ({"rank": 2, "alpha": -3}, ValueError, r"alpha is -3.0; expected a finite number above 0"),
        ({"rank": 2, "alpha": 0}, ValueError, "alpha is 0"),
        ({"modules_to_save": "lm_head"}, ValueError, r"modules_to_save is 'lm_head' \(str\); expected list\[str\]"),
        ({"train_shared_experts": "yes"}, ValueError, r"train_shared_experts is 'yes' \(str\); expected bool"),
        ({"alpha": 2}, ValueError, "have no effect without rank"),
        ({"use_rslora": True}, ValueError, "have no effect without rank"),
        ({"train_shared_experts": True}, ValueError, "OlmoeForCausalLM has no shared experts"),
    ],
)
def test_settings_are_honoured_or_refused(settings, error, message):
    base = tiny_model("olmoe")
    with pytest.raises(error, match=message):
        get_peft_model(base, config_for(base, **settings))


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="Linear has no experts module"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2))[0], ESFTConfig(target_experts={0: [0]}))


def test_a_layer_with_two_containers_must_be_named_by_path():
    first, second = tiny_model("olmoe").model.layers[0].mlp.experts, tiny_model("gpt_oss").model.layers[0].mlp.experts
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"text": first, "image": second})])}
    )
    with pytest.raises(ValueError, match=r"layer 0 has several experts modules.*layers.0.text.*layers.0.image"):
        get_peft_model(model, ESFTConfig(target_experts={0: [0]}))
    get_peft_model(model, ESFTConfig(target_experts={"layers.0.image": [0]}))


def test_quantised_and_expert_parallel_containers_are_refused():
    base = tiny_model("olmoe")
    experts = base.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"layers.1.mlp.experts.down_proj has dtype torch.float8_e4m3fn"):
        get_peft_model(base, config_for(base))
    assert not any(isinstance(module, peft_esft.ESFTLayer) for module in base.modules())
    base = tiny_model("olmoe")
    base.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="is not shared out by expert"):
        get_peft_model(base, config_for(base))


def test_containers_that_share_some_of_their_weights_are_refused():
    base = tiny_model("olmoe")
    first, second = (layer.mlp.experts for layer in base.model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(NotImplementedError, match=r"layers.1.mlp.experts .*shares some, but not all.*layers.0.mlp"):
        get_peft_model(base, ESFTConfig(target_experts={1: [1]}))
    assert not any(isinstance(module, peft_esft.ESFTLayer) for module in base.modules())


def test_shapes_in_the_file_that_do_not_fit_the_base_are_refused(tmp_path):
    base = tiny_model("olmoe")
    get_peft_model(base, config_for(base)).save_pretrained(tmp_path)
    other = tiny_model("mixtral")
    other.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(8, 32, 16))
    with pytest.raises(ValueError, match=r"esft_down_proj is .*\[3, 32, 24\]; expected .*\[3, 32, 16\]"):
        PeftModel.from_pretrained(other, tmp_path)


def test_types_cannot_be_mixed_in_one_model():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="ESFT"):
        get_peft_model(tiny_model("olmoe"), config_for(base), mixed=True)


@pytest.fixture
def adapter_folder(tmp_path):
    base = tiny_model("olmoe")
    get_peft_model(base, config_for(base, init_weights=False)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_what_peft_offers_for_other_types_only_is_an_error_and_not_ignored(adapter_folder):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base))
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but ESFT was passed"):
        hotswap_adapter(model, adapter_folder, adapter_name="default")
    assert list(model.peft_config) == ["default"]


def test_transformers_hotswap_is_an_error_and_not_ignored(adapter_folder):
    model = tiny_model("olmoe")
    model.load_adapter(adapter_folder)
    before = {key: delta.clone() for key, delta in deltas_of(model).items()}
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        model.load_adapter(adapter_folder, adapter_name="default", hotswap=True)
    assert all(torch.equal(delta, before[key]) for key, delta in deltas_of(model).items())


def test_mixed_models_refuse_esft(adapter_folder):
    with pytest.raises(ValueError, match="ESFT is not supported for mixed models"):
        PeftMixedModel.from_pretrained(tiny_model("olmoe"), adapter_folder)
    base = tiny_model("olmoe")
    mixed = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), mixed=True)
    before = str(mixed)
    with pytest.raises(ValueError, match="'ESFT' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("experts", config_for(base))
    assert str(mixed) == before


@pytest.mark.parametrize(
    "name", ["experts", "model", "0", "weight", "esft_down_proj", "modules_to_save", "base_layer"]
)
def test_adapters_are_not_named_like_modules_and_parameters(name):
    """PEFT leaves out of a file what has another adapter's name as a part of its own."""
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base), adapter_name="first")
    with pytest.raises(ValueError, match=f"'{name}' cannot be an adapter's name.*'{name}_adapter' works"):
        model.add_adapter(name, config_for(base))
    assert list(model.peft_config) == ["first"]


@pytest.mark.filterwarnings("ignore:Adapter name 'esft' should not be contained in the prefix")
@pytest.mark.parametrize("name", ["esft", "gate_up_proj_0", "law v1"])
def test_adapters_may_have_any_other_name(name, tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, init_weights=False), adapter_name=name).eval()
    expected = model(input_ids=random_tokens())[0]
    model.save_pretrained(tmp_path)
    folder = str(tmp_path / name)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), folder, adapter_name=name).eval()
    assert torch.equal(loaded(input_ids=random_tokens())[0], expected)
    plain = tiny_model("olmoe")
    plain.load_adapter(folder, adapter_name=name)
    assert torch.equal(plain(input_ids=random_tokens())[0], expected)
    loaded.add_adapter("second", config_for(base))
    loaded.set_adapter("second")
    loaded.delete_adapter(name)
    assert all(list(layer.expert_ids) == ["second"] for layer in loaded.modules() if hasattr(layer, "expert_ids"))
    torch.testing.assert_close(loaded(input_ids=random_tokens())[0], tiny_model("olmoe")(input_ids=random_tokens())[0])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_every_experts_implementation_computes_the_merged_model_alike(family):
    outputs = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        base = tiny_model(family, experts_implementation=implementation)
        torch.manual_seed(0)
        model = get_peft_model(base, config_for(base, init_weights=False)).eval()
        outputs[implementation] = model(input_ids=random_tokens())[0]
        outputs[f"merged {implementation}"] = model.merge_and_unload()(input_ids=random_tokens())[0]
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["merged eager"], msg=lambda text, name=name: f"{name}: {text}")


def test_a_copied_config_shares_nothing_with_its_original():
    config = ESFTConfig(target_experts={0: [1]}, selection={"metric": "gate"})
    twin = copy.deepcopy(config)
    assert twin == config
    twin.target_experts["0"].append(2)
    twin.selection["metric"] = "token"
    assert (config.target_experts, config.selection) == ({"0": [1]}, {"metric": "gate"})


def test_find_experts_describes_containers_wrapped_or_not():
    base = tiny_model("gpt_oss")
    plain = find_experts(base)
    assert find_experts(get_peft_model(base, config_for(base))) == plain
    container = plain["model.layers.1.mlp.experts"]
    assert (container.layer_index, container.num_experts, container.hidden_size) == (1, 8, 32)
    assert container.layout.is_transposed and container.layout.has_bias
    assert container.parameters_per_expert == 32 * 48 + 24 * 32 + 48 + 32
    assert select_in_all(base).keys() == plain.keys()
    identity = find_experts(tiny_model("longcat_flash"))["model.layers.0.mlp.experts"]
    assert (identity.num_experts, identity.num_identity_experts) == (8, 4)


def test_the_forward_needs_no_seed_and_uses_no_randomness():
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base))
    state = torch.get_rng_state()
    model(input_ids=random_tokens())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("key", [1, "1"])
def test_layers_are_named_by_index_and_stored_by_path(key, tmp_path):
    base = tiny_model("deepseek_v2")  # its layer 0 is dense
    model = get_peft_model(base, ESFTConfig(target_experts={key: [3, 0]}))
    assert model.peft_config["default"].target_experts == {"model.layers.1.mlp.experts": [3, 0]}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("deepseek_v2"), tmp_path)
    assert loaded.peft_config["default"].target_experts == {"model.layers.1.mlp.experts": [3, 0]}


def test_a_refused_config_is_left_as_it_was():
    config = ESFTConfig(target_experts={0: [1]}, layers_to_transform=[5])
    with pytest.raises(ValueError, match="exclude all"):
        get_peft_model(tiny_model("olmoe"), config)
    assert config.target_experts == {"0": [1]}


@pytest.mark.parametrize("implementation", ["sonicmoe", "deepgemm"])
def test_kernels_that_the_split_forward_takes_the_place_of_are_named(implementation):
    base = tiny_model("olmoe")
    base.config._experts_implementation = implementation  # the kernels themselves need a GPU
    with pytest.warns(UserWarning, match=f"'{implementation}' is not used while an adapter is active"):
        get_peft_model(base, config_for(base))


def test_a_checkpoint_in_few_bits_is_known_in_a_fresh_process_that_loads_no_adapter(tmp_path):
    model = tiny_model("olmoe")
    peft_esft.quantize_experts(model, bits=8)
    model.save_pretrained(tmp_path)
    code = (
        "import peft_esft\nfrom transformers import AutoModelForCausalLM\n"
        f"print(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).model.layers[0].mlp.experts)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "StoredRows(int8" in result.stdout
