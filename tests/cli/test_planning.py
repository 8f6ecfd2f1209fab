"""Plans on paper: counts of parameters, known cases by hand, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from peft import get_peft_model

from peft_esft import quantize_experts
from peft_esft.cli.main import main
from peft_esft.moe.quantised_formats import ENCODERS
from peft_esft.scoring.memory_estimate import (
    Setup,
    base_bytes,
    estimate,
    most_experts,
    num_trained,
    plan,
    recommended,
    what_would_fit,
)
from peft_esft.scoring.model_sizes import ModelSizes

from families import tiny_model
from oracle import config_for
from repository import ROOT


MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
SIZES = ModelSizes(
    total=1_000,
    units=(400, 400),
    unit_experts=(0, 300),
    expert=30,
    expert_per_rank=21,
    num_experts=10,
    top_k=2,
    hidden_size=5,
    intermediate_size=2,
    vocab_size=20,
    lora_per_rank=7,
    attention_per_rank=3,
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
    assert num_trained(sizes, Setup(share=0.5), "ESFT") == half
    assert asdict(ModelSizes.of(trained)) == asdict(sizes)  # an adapter is no part of the model
    low = get_peft_model(tiny_model(family), config_for(model, list(range(4)), rank=3))
    assert num_trained(sizes, Setup(share=0.5, rank=3), "ESFT") == sum(
        p.numel() for p in low.parameters() if p.requires_grad
    )
    with pytest.raises(ValueError, match="no experts module"):
        ModelSizes.of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_of_a_quantised_model_are_those_of_the_plain_one(bits):
    plain = tiny_model("olmoe")
    sizes = ModelSizes.of(quantize_experts(tiny_model("olmoe"), bits=bits))
    assert sizes == replace(ModelSizes.of(plain), stored_as="nf4" if bits == 4 else "int8")


def test_bytes_of_a_base_are_those_of_its_form():
    model = tiny_model("olmoe").to(torch.bfloat16)
    sizes = ModelSizes.of(model)
    for base in ("int8", "nf4"):
        own = quantize_experts(tiny_model("olmoe").to(torch.bfloat16), bits=8 if base == "int8" else 4)
        assert base_bytes(sizes, base) == sum(parameter.nbytes for parameter in own.parameters())
        for shape in ((3, 2048, 2048), (3, 2048, 1024)):  # at real sizes too
            layout = ENCODERS[base].layout(shape, torch.bfloat16).values()
            held = sum(dtype.itemsize * math.prod(size) for dtype, size in layout)
            assert held == pytest.approx(math.prod(shape) * {"int8": 1, "nf4": 0.5625}[base], rel=4e-3)


def test_estimates_by_hand():
    setup = Setup(gpus=4, memory=1e4, tokens=3, share=0.1, lora_rank=2)
    fsdp = estimate(SIZES, setup, "ESFT", "FSDP2")
    assert fsdp.base == 2 * 1000 / 4
    assert fsdp.state == 16 * 30 / 4
    assert fsdp.gathered == 2 * (200 + 800) + 2 * 8 * 15
    # Weights and deltas twice, but the root once; the deltas' gradients once.
    assert fsdp.sent == 3 / 4 * (2 * (2 * 1000 + 4 * 30) - 2 * 200 + 4 * 30)
    assert estimate(SIZES, setup, "LoRA", "FSDP2").state == 16 * 14 / 4
    assert estimate(SIZES, setup, "LoRA attention", "FSDP2").state == 16 * 6 / 4
    full = estimate(SIZES, replace(setup, base="fp32"), "full", "FSDP2")
    assert (full.base, full.state) == (0, 16 * 1000 / 4)
    assert full.sent == 3 / 4 * (2 * 4 * 1000 - 4 * 200 + 4 * 1000)
    half = estimate(SIZES, setup, "full")
    assert (half.base, half.state, half.copies) == (0, 8 * 1000, 2 * 1000)
    experts = estimate(SIZES, setup, "ESFT", "EP")
    pairs = 3 * 2 * 5 * 2  # tokens, top_k, width, bytes
    assert experts.sent == 3 / 4 * (2 * (2 * 500 + 200) + 6 * pairs)
    copies = estimate(SIZES, setup, "ESFT", "DDP")
    assert (copies.base, copies.state, copies.sent) == (2000, 20 * 30, 2 * 3 / 4 * 4 * 30)


def test_the_peak_by_hand():
    """Of the optimizer's step, or of the loss, where gradients are not there yet."""
    setup = Setup(memory=1e4, tokens=3)
    alone = estimate(SIZES, setup)
    assert (alone.base, alone.state, alone.gathered, alone.sent, alone.copies) == (2000, 480, 0, 0, 120)
    inputs, logits = 3 * 2 * 5 * 2, 3 * 20 * 12
    layer = 3 * (2 * (10 + 8) + 60) * 2 + 2 * 30 / 3  # with the effective rows of the down projection
    assert alone.activations == max(inputs + logits - 120, layer)
    assert alone.total == 2480 + alone.activations
    assert estimate(SIZES, replace(setup, accumulates=True)).activations == inputs + max(logits, layer)
    many = estimate(SIZES, replace(setup, share=1.0))
    assert many.total == 2000 + 20 * 300
    assert (
        estimate(SIZES, replace(setup, share=1.0, optim="adamw_torch_fused")).total
        == 2000 + 16 * 300 + 3 * 96 * 2 + 200
    )
    assert estimate(SIZES, replace(setup, optim="adamw_8bit")).state == pytest.approx(30 * (8 + 2 + 8 / 256))
    assert estimate(SIZES, replace(setup, optim="paged_adamw_8bit")).state == 30 * 8
    low = estimate(SIZES, replace(setup, rank=2))
    assert low.trained == pytest.approx(0.1 * 300 / 30 * 2 * 21)
    assert low.base == 2000
    eager = replace(SIZES, scored_heads=100)
    assert estimate(eager, setup).activations == layer + 4 * 100 * 9 * 2


def test_the_recommended_engine_fits_and_sends_least():
    for gpus, expected in ((1, "one GPU"), (2, "DDP"), (3, "DDP")):
        assert recommended(plan(SIZES, Setup(gpus, 1e5, tokens=1))).engine == expected
    large = replace(SIZES, total=10_200, units=(1_000,) * 10, unit_experts=(900,) * 10)
    for gpus, expected in ((2, "EP"), (3, "FSDP2")):  # three do not share out ten experts
        best = recommended(plan(large, Setup(gpus, 22_500, tokens=1)))
        assert (best.engine, best.setup.base) == (expected, "bf16")
    best = recommended(plan(large, Setup(1, 35_000, tokens=1)))
    assert (best.engine, best.setup.base) == ("one GPU", "nf4")  # before the host is asked for weights
    assert recommended(plan(SIZES, Setup(1, 10))) is None


def test_what_would_fit_changes_as_little_as_possible():
    sizes = replace(SIZES, hidden_size=2, intermediate_size=1)  # with few rows, and so few scales of int8
    setup = Setup(tokens=1, memory=2800)
    assert not estimate(sizes, setup).fits
    ways = what_would_fit(sizes, setup)
    assert ways and all(way.fits for way in ways)
    changed = [
        sum(getattr(way.setup, name) != getattr(setup, name) for name in asdict(setup)) + (way.engine == "offload")
        for way in ways
    ]
    assert set(changed) == {1}
    assert {(way.engine, way.setup.base) for way in ways} >= {
        ("one GPU", "int8"),
        ("one GPU", "nf4"),
        ("offload", "bf16"),
    }
    fewer = [way for way in ways if way.setup.share < 0.1]
    assert not fewer  # not even one of ten experts fits with everything else as it was
    assert what_would_fit(sizes, replace(setup, memory=100)) == []


@pytest.mark.parametrize("memory", [2500, 3000, 4000, 6000, 1e5])
def test_the_most_experts_fit_and_one_more_does_not(memory):
    setup = Setup(tokens=1, memory=memory)
    most = most_experts(SIZES, setup)
    if most:
        assert estimate(SIZES, replace(setup, share=most / 10)).fits
    if most < 10:
        assert not estimate(SIZES, replace(setup, share=(most + 1) / 10)).fits


def test_gpt_oss_is_planned_as_it_is_stored():
    sizes = replace(SIZES, stored_as="mxfp4")
    (stored,) = [own for own in plan(sizes, Setup(memory=1e9)) if own.setup.base == "mxfp4"]
    assert stored.base == pytest.approx(300 * 0.53125 + 700 * 2)
    assert stored.fits
    tight = Setup(tokens=1, memory=2950)
    forms = [{way.setup.base for way in what_would_fit(own, tight)} for own in (sizes, SIZES)]
    assert forms[0] == forms[1] | {"mxfp4"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "-5"], "tokens is -5"),
        (["--share", "7"], "share is 7.0"),
        (["--rank", "0"], "rank is 0"),
        (["--top-p", "0.5"], "--top-p and --metric select from scores"),
        (["--metric", "token"], "--top-p and --metric select from scores"),
    ],
)
def test_settings_out_of_range_are_refused(flags, message, capsys):
    assert main(["plan", MODEL, "--gpus", "2x24GB", *flags]) == 1
    assert message in capsys.readouterr().err
    for name in ("base", "optim"):
        with pytest.raises(ValueError, match=f"{name} is 'none'"):
            Setup(**{name: "none"})


@pytest.mark.parametrize("gpus", ["8", "x80GB", "0x80GB", "8x0GB", "8x", "eight x 80", "8x80"])
def test_malformed_gpus_are_refused(gpus, capsys):
    assert main(["plan", MODEL, "--gpus", gpus]) == 1
    assert "for example 24GB or 8x80GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "number", "memory"), [("24GB", 1, 24e9), ("2x24gb", 2, 24e9), ("1 x 16GiB", 1, 2**34)]
)
def test_gpus_are_read(gpus, number, memory):
    setup = Setup.parse(gpus, rank=4)
    assert (setup.gpus, setup.memory, setup.rank) == (number, memory, 4)


@pytest.mark.parametrize("model", [MODEL, f"{MODEL}/config.json"])
def test_the_command_prints_the_plan(model, capsys):
    assert main(["plan", model, "--gpus", "24GB", "2x24GB", "--tokens", "100", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["num_experts"] == 64
    alone, both = record["plans"]
    assert alone["recommended"]["engine"] == "one GPU" and not alone["would_fit"]
    assert {own["engine"] for own in both["estimates"]} == {"DDP", "FSDP2", "EP"}
    assert {own["setup"]["base"] for own in alone["estimates"]} == {"bf16", "fp32", "int8", "nf4"}
    assert main(["plan", model, "--gpus", "2x24GB", "--optim", "adamw_8bit", "adamw_torch"]) == 0
    text = capsys.readouterr().out
    assert "recommended for ESFT" in text and "adamw_8bit" in text and text.count("\n") >= 20


def test_the_command_names_what_would_fit(capsys):
    assert main(["plan", MODEL, "--gpus", "20MB", "--tokens", "64"]) == 0
    text = capsys.readouterr().out
    assert "does not fit. What would" in text and "more GPUs" not in text
    assert main(["plan", MODEL, "--gpus", "1MB"]) == 0
    assert "ESFT does not fit, not even" in capsys.readouterr().out


def test_the_share_is_that_of_a_selection(tmp_path, capsys):
    data = tmp_path / "rows.txt"
    data.write_text("a line of text\n" * 20)
    assert main(["score", MODEL, "--data", str(data), "--out", str(tmp_path / "scores.json")]) == 0
    for ignored in (["--rank", "3"], ["--tokens", "5"], ["--min-experts", "2"], ["--out", str(tmp_path / "new")]):
        assert main(["select", str(tmp_path / "scores.json"), "--preview", *ignored]) == 1
        assert f"leave out {ignored[0]}" in capsys.readouterr().err
    assert main(["select", str(tmp_path / "scores.json"), "--json", "--top-p", "0.3"]) == 0
    out = capsys.readouterr().out
    chosen = sum(map(len, json.loads(out[out.index("{") :]).values()))
    command = ["plan", MODEL, "--gpus", "24GB", "--json", "--experts", str(tmp_path / "scores.json"), "--top-p", "0.3"]
    assert main(command) == 0
    (own,) = json.loads(capsys.readouterr().out)["plans"]
    assert own["setup"]["share"] == pytest.approx(chosen / (4 * 64))
