"""Malformed adapters, one fault each: refused with an error that names the fault, the base as it was."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_esft import ESFTConfig

from families import tiny_model
from refusals import REFUSALS, WEIGHTS, copied, load_or_refuse, rewrite_config


PATHS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
KEYS = [f"base_model.model.{path}.esft_{name}" for path in PATHS for name in ("down_proj", "gate_up_proj")]
NUMBER = 9 * 1024**3
ANY = [[], {}, [None], {"a": 1}, 1.5, math.nan]

NO_BOOL = ["yes", "", 1, 0, [True], {"a": True}, 0.5, math.inf]
FIELDS = {
    **dict.fromkeys(
        [
            "train_shared_experts",
            "train_non_expert_modules",
            "init_weights",
            "inference_mode",
        ],
        NO_BOOL,
    ),
    "use_rslora": [True, "yes", 1, [True], {"a": True}, 0.5],
    "rank": ["4", "", 0, -1, True, NUMBER, *ANY],
    "alpha": ["4", "", 1, -1, True, *ANY],
    "modules_to_save": ["lm_head", 3, True, [3], [None], [["lm_head"]], {"a": 1}, 1.5],
    "exclude_modules": ["(", "*", 3, True, [3], [None], ["("], [["a"]], {"a": 1}, 1.5],
    "layers_to_transform": ["0", True, ["0"], [None], [[0]], [0.5], [True], {"a": 1}, 1.5],
    "layers_pattern": ["layers", "(", 3, True, ["("], [3], {"a": 1}, 1.5],
    "selection": [
        "x",
        3,
        True,
        [1],
        1.5,
        {"num_experts": 3},
        {"num_experts": []},
        {"num_experts": {PATHS[0]: "8"}},
        {"num_experts": {PATHS[0]: 1.5}},
        {"num_experts": {PATHS[0]: 9}},
    ],
    "base_fingerprint": [
        "x",
        3,
        True,
        [1],
        1.5,
        {"rows": 3},
        {"rows": {PATHS[0]: 3}},
        {"rows": []},
        {"num_experts": 3},
        {"num_experts": {PATHS[1]: 7}},
        {"commit": 3},
    ],
    "storage": ["x", "", 3, True, None, [], {}, ["delta"], "rows", "int8", "int4", "int1", 1.5],
    "base_model_name_or_path": [3, True, [], {}, 1.5],
    "revision": [3, True, [], {}, 1.5],
    "task_type": [3, True, ["x"], {"a": 1}, 1.5, "nothing"],
    "target_experts": [
        *["x", 3, True, [1], 1.5, {}, {"9": [0]}, {"-1": [0]}, {"": [0]}, {"model": [0]}, {"lm_head": [0]}],
        *[{"model.layers.7.mlp.experts": [0]}, {PATHS[0]: [0], "0": [1]}, {"1.5": [0]}, {"../0": [0]}, {"None": [0]}],
        *[
            {"0": ids}
            for ids in (
                *([], 3, "12", None, True, 1.5, {"1": 2}, [-1], [8], [10**30], [0, 0], [5, 1, 5], [1.5], ["1"]),
                *([None], [True], [[1]], [{}], [math.nan], [math.inf], [0, -3], [0, 99], list(range(9))),
            )
        ],
    ],
}
ALSO_NAMED_BY = {
    "selection": "num_experts|were chosen among",
    "base_fingerprint": "were chosen among",
    "storage": "esft_down_proj_(rows|codes)",
    "task_type": "task type",
    "target_experts": "experts",
}
CONFIGS = [(field, value) for field, values in FIELDS.items() for value in values]


def is_named(error: Exception | None, pattern: str) -> bool:
    return error is not None and re.search(pattern, str(error)) is not None


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    config = ESFTConfig(target_experts={path: [5, 1, 6] for path in PATHS}, init_weights=False)
    get_peft_model(tiny_model("olmoe"), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base():
    return tiny_model("olmoe")


@pytest.mark.parametrize(("field", "value"), CONFIGS, ids=[f"{f}-{str(v)[:30]}" for f, v in CONFIGS])
@pytest.mark.filterwarnings("ignore")
def test_a_field_is_refused_by_its_name(field, value, adapter, base, tmp_path):
    folder = copied(adapter, tmp_path / "x")
    rewrite_config(folder, **{field: value})
    error = load_or_refuse(base, folder)
    assert is_named(error, f"{field}|{ALSO_NAMED_BY.get(field, field)}"), error


def without(key):
    return lambda tensors: tensors.pop(key)


def renamed(key, name):
    return lambda tensors: tensors.update({name: tensors.pop(key)})


def changed(key, function):
    return lambda tensors: tensors.update({key: function(tensors[key]).contiguous()})


CHANGES = {
    "one row less": lambda t: t[:-1],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "no row": lambda t: t[:0],
    "one expert": lambda t: t[0],
    "a dimension more": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "a scalar": lambda t: t.sum(),
    "empty": lambda t: t.new_empty(0),
    "transposed": lambda t: t.transpose(1, 2),
    "experts last": lambda t: t.permute(1, 2, 0),
    "narrower": lambda t: t[:, :, :-1],
    "shorter": lambda t: t[:, :-1],
    "wider": lambda t: torch.cat([t, t[:, :, :1]], 2),
    "longer": lambda t: torch.cat([t, t[:, :1]], 1),
    "doubled": lambda t: torch.cat([t, t], 2),
    **{f"of {dtype}": lambda t, dtype=dtype: t.to(dtype) for dtype in (torch.int64, torch.int32, torch.int16)},
    **{f"of {dtype}": lambda t, dtype=dtype: t.to(dtype) for dtype in (torch.int8, torch.uint8, torch.bool)},
}
NAMES = {
    "with an adapter's name": lambda key: f"{key}.default",
    "with a factor's": lambda key: f"{key}_A",
    "with the other factor's": lambda key: f"{key}_B",
    "with codes'": lambda key: f"{key}_codes",
    "of a layer that is not there": lambda key: key.replace("layers.", "layers.1"),
    "of another container": lambda key: key.replace("experts", "gate"),
    "of another weight": lambda key: key.replace("_proj", "_norm"),
    "LoRA's": lambda key: key.replace("esft_", "lora_A."),
    "IA3's": lambda key: key.replace("esft_", "ia3_l."),
    "the base's": lambda key: key.replace(".esft_", "."),
}
TENSORS = {
    **{f"{key} is missing": (without(key), key) for key in KEYS},
    **{f"{key} {how}": (changed(key, function), key) for key in KEYS for how, function in CHANGES.items()},
    **{f"{key} {how}": (renamed(key, name(key)), key) for key in KEYS for how, name in NAMES.items()},
    "no tensors": (dict.clear, KEYS[0]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_is_refused_by_its_name(case, adapter, base, tmp_path):
    change, key = TENSORS[case]
    folder = copied(adapter, tmp_path / "x")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    error = load_or_refuse(base, folder)
    # Where all tensors of an adapter fail only some are listed, this one maybe not among them.
    strange = [name for name in tensors if ".esft_" not in name]  # named alone, before a model is looked at
    assert is_named(error, re.escape(strange[0] if strange else key)), error


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", KEYS)
def test_a_value_that_is_not_finite_is_refused(key, value, adapter, base, tmp_path):
    folder = copied(adapter, tmp_path / "x")
    tensors = load_file(folder / WEIGHTS)
    tensors[key][-1, 2, -1] = value
    save_file(tensors, folder / WEIGHTS)
    assert is_named(load_or_refuse(base, folder), rf"{re.escape(key)} holds a NaN")


BAD_ENTRIES = {
    "dtype": [None, 3, "", "F31", "f32", "U64", [], {}, "F64", True],
    "shape": [None, 3, "", [3], [-3, 32, 24], [3, 32, 24.0], [3, 32, "24"], [2**62, 2**62], {}, [3, 32, None], [[3]]],
    "data_offsets": [None, 3, "", [0], [0, 0], [-1, 5], [0, 2**63], [5, 1], [0.0, 9.0], {}, ["0", "9"], [0, 9, 9]],
}
ENTRIES = [(key, part, value) for key in KEYS for part, values in BAD_ENTRIES.items() for value in values]


@pytest.mark.parametrize(("key", "part", "value"), ENTRIES, ids=[f"{k[29:]}-{p}-{v}" for k, p, v in ENTRIES])
def test_an_entry_of_the_header_is_refused_with_the_file_s_name(key, part, value, adapter, base, tmp_path):
    def change(header):
        header[key][part] = value

    rewrite_header(copied(adapter, tmp_path / "x"), change)
    assert is_named(load_or_refuse(base, tmp_path / "x"), WEIGHTS)


@pytest.mark.parametrize("value", [None, 3, "", [], True, {}, {"dtype": "F32"}], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_an_entry_that_is_none_is_refused(key, value, adapter, base, tmp_path):
    rewrite_header(copied(adapter, tmp_path / "x"), lambda header: header.update({key: value}))
    assert is_named(load_or_refuse(base, tmp_path / "x"), WEIGHTS)


def rewrite_header(folder: Path, change) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


NUMBER_OF_CUTS = 60


@pytest.mark.parametrize("share", range(NUMBER_OF_CUTS))
def test_a_file_that_is_cut_short_is_refused(share, adapter, base, tmp_path):
    folder = copied(adapter, tmp_path / "x")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) * share // NUMBER_OF_CUTS])
    assert is_named(load_or_refuse(base, folder), WEIGHTS)


LENGTHS = [0, 1, 7, 100_000_001, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_of_an_absurd_length_is_not_read(length, adapter, base, tmp_path):
    folder = copied(adapter, tmp_path / "x")
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    assert is_named(load_or_refuse(base, folder), WEIGHTS)


NO_OBJECTS = [b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}{}", b"\xff\xfe", b"{'a': 1}"]


@pytest.mark.parametrize("content", NO_OBJECTS, ids=str)
def test_a_config_that_is_no_object_is_refused(content, adapter, tmp_path):
    folder = copied(adapter, tmp_path / "x")
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        ESFTConfig.from_pretrained(str(folder))


def test_there_are_enough_cases_and_what_is_refused_changes_no_adapter_either(adapter, tmp_path):
    assert len(CONFIGS) + len(TENSORS) + len(ENTRIES) + len(LENGTHS) + len(NO_OBJECTS) + NUMBER_OF_CUTS >= 500
    model = PeftModel.from_pretrained(tiny_model("olmoe"), str(adapter), adapter_name="first")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number, (field, value) in enumerate(CONFIGS[::5]):
        folder = copied(adapter, tmp_path / str(number))
        rewrite_config(folder, **{field: value})
        with pytest.raises(REFUSALS):
            model.load_adapter(str(folder), adapter_name="second")
    after = model.state_dict()
    assert list(model.peft_config) == ["first"] and before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
