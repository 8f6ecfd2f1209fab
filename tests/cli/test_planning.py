"""Plans on paper: counts of parameters, known cases by hand, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

from peft_esft.cli.main import main
from peft_esft.scoring.memory_estimate import ModelSizes, Setup, estimate, num_trained, plan, recommended

from families import tiny_model
from oracle import config_for
from repository import ROOT


MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
SIZES = ModelSizes(
    total=1_000,
    units=(400, 400),
    unit_experts=(0, 300),
    expert=30,
    num_experts=10,
    top_k=2,
    hidden_size=5,
    intermediate_size=2,
    vocab_size=20,
    lora_per_rank=7,
)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_sizes_are_those_of_the_model(family):
    model = tiny_model(family)
    sizes = ModelSizes.of(model)
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.root == sizes.total - sum(p.numel() for p in model.model.layers.parameters())
    experts = [p.numel() for name, p in model.named_parameters() if ".experts." in name and "shared" not in name]
    assert sizes.experts == sum(experts)
    assert (sizes.num_experts, sizes.top_k, sizes.hidden_size) == (8, 2, 32)
    assert sizes.num_moe_layers == (1 if family == "deepseek_v3" else 2)
    trained = get_peft_model(model, config_for(model, list(range(4))))
    half = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert num_trained(sizes, Setup(1, 0, share=0.5), "ESFT") == half
    with pytest.raises(ValueError, match="no experts container"):
        ModelSizes.of(torch.nn.Linear(2, 2))


def test_estimates_by_hand():
    setup = Setup(gpus=4, memory=1e4, tokens=3, share=0.1, rank=2, element=2)
    fsdp = estimate(SIZES, setup, "ESFT", "FSDP2")
    assert fsdp.base == 2 * 1000 / 4
    assert fsdp.state == 16 * 30 / 4
    assert fsdp.gathered == 2 * (200 + 800) + 2 * 8 * 15
    # Weights and deltas twice, but the root once; the deltas' gradients once.
    assert fsdp.sent == 3 / 4 * (2 * (2 * 1000 + 4 * 30) - 2 * 200 + 4 * 30)
    assert estimate(SIZES, setup, "LoRA", "FSDP2").state == 16 * 14 / 4
    full = estimate(SIZES, setup, "full", "FSDP2")
    assert (full.base, full.state) == (0, 16 * 1000 / 4)
    assert full.sent == 3 / 4 * (2 * 2 * 1000 - 2 * 200 + 4 * 1000)
    experts = estimate(SIZES, setup, "ESFT", "EP")
    pairs = 3 * 2 * 5 * 2  # tokens, top_k, width, bytes
    assert experts.sent == 3 / 4 * (2 * (2 * 500 + 200) + 6 * pairs)
    alone = estimate(SIZES, setup, "ESFT", "one GPU")
    assert (alone.base, alone.state, alone.gathered, alone.sent) == (2000, 480, 0, 0)
    inputs, layer, logits = 2 * 5 * 2, (2 * (10 + 8) + 60) * 2, 20 * 10
    assert alone.activations == 3 * (inputs + max(layer, logits))
    assert alone.total == 2480 + alone.activations
    assert alone.fits(setup) == (alone.total <= 9000)


def test_the_recommended_engine_fits_and_sends_least():
    for gpus, expected in ((1, "one GPU"), (2, "EP"), (3, "FSDP2")):  # three do not share out ten experts
        setup = Setup(gpus, 1e5, tokens=1)
        assert recommended(plan(SIZES, setup), setup).engine == expected
    assert recommended(plan(SIZES, Setup(1, 10)), Setup(1, 10)) is None
    short = Setup(1, 1.1 * estimate(SIZES, Setup(1, 0, tokens=1), "ESFT", "one GPU").total, tokens=1)
    assert recommended(plan(SIZES, short), short).engine == "offload"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--tokens", "-5"], "tokens is -5"), (["--share", "7"], "share is 7.0"), (["--rank", "0"], "rank is 0")],
)
def test_settings_out_of_range_are_refused(flags, message, capsys):
    assert main(["plan", MODEL, "--gpus", "2x24GB", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("gpus", ["8", "x80GB", "0x80GB", "8x0GB", "8x", "eight x 80"])
def test_malformed_gpus_are_refused(gpus, capsys):
    assert main(["plan", MODEL, "--gpus", gpus]) == 1
    assert "for example 8x80GB" in capsys.readouterr().err


@pytest.mark.parametrize("model", [MODEL, f"{MODEL}/config.json"])
def test_the_command_prints_the_plan(model, capsys):
    assert main(["plan", model, "--gpus", "2x24GB", "--tokens", "100", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["num_experts"] == 64
    assert record["recommended"] in ("FSDP2", "EP")
    assert len(record["estimates"]) == 6
    assert main(["plan", model, "--gpus", "2x24GB"]) == 0
    text = capsys.readouterr().out
    assert "recommended for ESFT" in text and text.count("\n") >= 10
    assert main(["plan", model, "--gpus", "1x0.001GB"]) == 0
    assert "ESFT does not fit" in capsys.readouterr().out
