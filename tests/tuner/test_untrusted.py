"""Tests adapter files of strangers: refused with a clear error, and the model is what it was."""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_esft import ESFTConfig, ESFTLayer, hotswap_adapter
from peft_esft.cli.main import main
from peft_esft.interchange.adapter import AdapterFolder
from peft_esft.interchange.tensor_files import TensorFolder
from peft_esft.tuner.adapter_file import read_header
from peft_esft.tuner.file_checks import check_finite_header

from families import tiny_model
from oracle import config_for
from refusals import REFUSALS, WEIGHTS, copied, load_or_refuse, rewrite_config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted")
    get_peft_model(tiny_model("olmoe"), config_for(tiny_model("olmoe"), init_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base():
    return tiny_model("olmoe")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
PATHS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts", "0", "1", "2", "model", "../..", "", "lm_head"]
SELECTIONS = st.dictionaries(
    st.sampled_from(PATHS), st.lists(st.integers(-1, 9), max_size=5) | JSON_VALUES, max_size=3
)
FIELDS = [
    "target_experts",
    "train_shared_experts",
    "train_non_expert_modules",
    "rank",
    "alpha",
    "use_rslora",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_weights",
    "selection",
    "storage",
    "base_model_name_or_path",
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES | SELECTIONS, min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore")
def test_any_config_loads_or_is_refused(adapter, base, fields):
    with tempfile.TemporaryDirectory() as name:
        folder = copied(adapter, name)
        rewrite_config(folder, **fields)
        load_or_refuse(base, folder)


@settings(max_examples=150)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_damage_of_the_weights_is_noticed_or_harmless(adapter, base, data):
    content = bytearray((adapter / WEIGHTS).read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    kind = data.draw(st.sampled_from(["flip", "cut", "append", "header"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, 7 + length))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "append":
        content += data.draw(st.binary(min_size=1, max_size=64))
    else:
        header = json.loads(content[8 : 8 + length])
        key = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        header[key][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(
            JSON_VALUES | st.lists(st.integers(-1, 2**70), min_size=2, max_size=3)
        )
        encoded = json.dumps(header).encode()
        content[: 8 + length] = len(encoded).to_bytes(8, "little") + encoded
    with tempfile.TemporaryDirectory() as name:
        folder = copied(adapter, name)
        (folder / WEIGHTS).write_bytes(content)
        error = load_or_refuse(base, folder)
        assert error is None or str(error)
        if kind in ("cut", "append"):
            assert isinstance(error, ValueError)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_an_error(content):
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / WEIGHTS
        file.write_bytes(content)
        if content[:10] in (b"\x02" + bytes(7) + b"{}", b"\x03" + bytes(7) + b"{}") and len(content) <= 11:
            assert read_header(file) == {}
            return
        with pytest.raises(ValueError, match=re.escape(str(file))):
            read_header(file)


def break_rank(folder):
    rewrite_config(folder, rank=10**9)


def break_base_shapes(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v[:, :-1].contiguous() for k, v in tensors.items()}, folder / WEIGHTS)


def break_missing(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, folder / WEIGHTS)


def break_extra(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "base_model.model.model.norm.esft_weight": torch.zeros(1)}, folder / WEIGHTS)


def break_integers(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v.to(torch.int64) for k, v in tensors.items()}, folder / WEIGHTS)


def break_length(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((2**62).to_bytes(8, "little"))


def break_nesting(folder):
    header = b'{"a":' * 50_000
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


def break_into_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def break_experts(folder):
    rewrite_config(folder, target_experts={"0": [0] * 300_000})


def break_storage(folder):
    rewrite_config(folder, storage="int4")


def break_pattern(folder):
    rewrite_config(folder, exclude_modules="(")


def break_type(folder):
    rewrite_config(folder, train_non_expert_modules="yes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_rank, "rank is 1,000,000,000; it is at most the largest dimension"),
        (break_base_shapes, r"is torch.float32 \[3, 47, 32\]; expected torch.float32 \[3, 48, 32\]"),
        (break_missing, "layers.1.mlp.experts.esft_gate_up_proj is missing"),
        (break_extra, "norm.esft_weight is not selected, or not in this model"),
        (break_integers, r"is torch.int64 \[3, 48, 32\]"),
        (break_length, "is not a whole safetensors file"),
        (break_nesting, "is not a whole safetensors file"),
        (break_into_pickle, "pickled weights .* use_safetensors=False"),
        (break_experts, "repeats"),
        (break_storage, "esft_gate_up_proj_codes is missing"),
        (break_pattern, "exclude_modules has '\\(', which is not a regular expression"),
        (break_type, r"train_non_expert_modules is 'yes' \(str\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(change, message, adapter, base, tmp_path):
    folder = copied(adapter, tmp_path / "x")
    change(folder)
    error = load_or_refuse(base, folder)
    assert error is not None
    with pytest.raises(type(error), match=message):
        raise error
    model = PeftModel.from_pretrained(tiny_model("olmoe"), str(adapter), adapter_name="first")
    with pytest.raises(REFUSALS, match=message):
        model.load_adapter(str(folder), adapter_name="second")
    assert list(model.peft_config) == ["first"]
    assert not any("second" in layer.expert_ids for layer in model.modules() if isinstance(layer, ESFTLayer))


def test_pickled_weights_load_when_asked_for(adapter, tmp_path, monkeypatch):
    folder = copied(adapter, tmp_path / "x")
    break_into_pickle(folder)
    PeftModel.from_pretrained(tiny_model("olmoe"), str(folder), use_safetensors=False)
    monkeypatch.setenv("PEFT_ESFT_ALLOW_PICKLED", "1")
    model = PeftModel.from_pretrained(tiny_model("olmoe"), str(folder))
    assert any(isinstance(module, ESFTLayer) for module in model.modules())
    with pytest.raises(FileNotFoundError, match="could run code"):
        AdapterFolder(folder)


@pytest.mark.parametrize("fields", [{"storage": "int4"}, {"rank": 4}, {"storage": "rows"}], ids=str)
def test_a_config_that_belies_its_tensors_is_refused_without_a_base(fields, adapter, tmp_path, capsys):
    folder = copied(adapter, tmp_path / "x")
    rewrite_config(folder, **fields)
    for arguments in (["inspect", folder], ["diff", folder, adapter], ["diff", adapter, folder]):
        assert main([str(argument) for argument in arguments]) == 1
        assert "tensors that do not belong to the form" in capsys.readouterr().err


def test_a_malformed_config_of_a_base_is_refused(adapter, tmp_path, capsys):
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": "x"}))
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "base"), str(adapter), str(tmp_path / "out")]) == 1
    assert "is malformed" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_line_refuses_too(adapter, tmp_path, capsys):
    for change in (break_length, break_into_pickle, break_type):
        folder = copied(adapter, tmp_path / change.__name__)
        change(folder)
        assert main(["merge", str(folder), str(folder), str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.startswith("peft-esft: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", 3, None])
def test_an_index_cannot_lead_out_of_its_folder(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not a plain file name"):
        TensorFolder.of_model(tmp_path)


def test_a_huge_config_is_not_read(adapter, base, tmp_path):
    folder = copied(adapter, tmp_path / "x")
    with (folder / "adapter_config.json").open("a") as file:
        os.truncate(file.fileno(), 60_000_000)
    with pytest.raises(ValueError, match=r"60,000,000 bytes; at most 50,000,000"):
        ESFTConfig.from_pretrained(str(folder))
    with pytest.raises(ValueError, match=r"60,000,000 bytes; at most 50,000,000"):
        AdapterFolder(folder)


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=9),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.lists(st.integers(0, 5), max_size=3)
        ),
        max_size=5,
    )
)
def test_tensors_are_read_as_the_library_reads_them(layout):
    tensors = {key: torch.ones(shape).to(dtype) for key, (dtype, shape) in layout.items()}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "x.safetensors"
        save_file(tensors, file)
        folder = TensorFolder([file])
        assert {key: (e.dtype, e.shape) for key, e in folder.entries.items()} == {
            key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
        }
        assert all(torch.equal(folder.read(key), value) for key, value in tensors.items())


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    data=st.data(),
)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(sizes, dtype, data, tmp_path):
    largest = torch.finfo(dtype).max
    tensors = {
        f"w{place}": torch.full((size,), largest, dtype=torch.float64).to(dtype) for place, size in enumerate(sizes)
    }
    save_file({**tensors, "codes": torch.full((9,), 255, dtype=torch.uint8)}, tmp_path / WEIGHTS)
    check_finite_header(read_header(tmp_path / WEIGHTS))

    key = data.draw(st.sampled_from([key for key, tensor in tensors.items() if len(tensor)] or [None]))
    if key is not None:
        place = data.draw(st.integers(0, len(tensors[key]) - 1))
        tensors[key][place] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        if dtype == torch.float8_e4m3fn:
            tensors[key][place] = float("nan")  # it has no infinity
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=f"broken: {key} holds a NaN or an infinity"):
            check_finite_header(read_header(tmp_path / WEIGHTS))


DELTA = "base_model.model.model.layers.1.mlp.experts.esft_down_proj"
HEAD = "base_model.model.lm_head.weight"


def load(model, folder):
    model.load_adapter(folder, adapter_name="second")


def swap(model, folder):
    hotswap_adapter(model, folder, adapter_name="default")


@pytest.mark.parametrize(
    ("replace", "key", "modules_to_save"), [(load, DELTA, None), (swap, DELTA, None), (load, HEAD, ["lm_head"])]
)
def test_broken_weights_leave_the_adapters_as_they_are(replace, key, modules_to_save, tmp_path):
    adapter = tmp_path / "sound"
    config = config_for(tiny_model("olmoe"), init_weights=False, modules_to_save=modules_to_save)
    get_peft_model(tiny_model("olmoe"), config).save_pretrained(adapter)
    model = PeftModel.from_pretrained(tiny_model("olmoe"), str(adapter))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder = copied(adapter, tmp_path / "broken")
    tensors = load_file(folder / WEIGHTS)
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{re.escape(key)} holds a NaN.*earlier checkpoint"):
        replace(model, str(folder))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
