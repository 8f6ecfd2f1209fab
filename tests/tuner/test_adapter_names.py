"""Adapters of any name are saved and loaded whole, or the name is refused before anything is changed."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_esft import ESFTConfig

from families import tiny_model
from oracle import random_tokens


TOKENS = random_tokens(2, 6)
SEGMENTS = sorted({part for path, _ in tiny_model("olmoe").named_parameters() for part in path.split(".")})
PARTS = [*SEGMENTS, "base_model", "base_layer", "esft_down_proj", "esft_gate_up_proj_rows", "default", "a", "B", "_A"]
NAMES = (
    st.sampled_from(PARTS)
    | st.lists(st.sampled_from(PARTS), min_size=2, max_size=2).map("_".join)
    | st.text(max_size=4)
)


def config(*experts: int) -> ESFTConfig:
    return ESFTConfig(target_experts={0: list(experts), 1: [2]}, init_weights=False)


def check(first: str, second: str) -> None:
    model = get_peft_model(tiny_model("olmoe"), config(1, 5), adapter_name="kept")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = []
    for name, experts in ((first, (0, 3)), (second, (4,))):
        known = [*model.peft_config]
        try:
            model.add_adapter(name, config(*experts))
            names.append(name)
        except ValueError:
            assert [*model.peft_config] == known
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ["kept", *names]:
            model.set_adapter(name)
            place = folder if name == "default" else f"{folder}/{name}"
            assert len(load_file(f"{place}/adapter_model.safetensors")) == 4
            loaded = PeftModel.from_pretrained(tiny_model("olmoe"), place).eval()
            with torch.no_grad():
                assert torch.equal(loaded(input_ids=TOKENS)[0], model.eval()(input_ids=TOKENS)[0])


@given(NAMES, NAMES)
@settings(max_examples=15)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_any_names_are_saved_whole_or_refused(first, second):
    torch.manual_seed(0)
    check(first, second)


@pytest.mark.slow
@given(NAMES, NAMES)
@settings(max_examples=100)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_very_many_names_are_saved_whole_or_refused(first, second):
    torch.manual_seed(0)
    check(first, second)
