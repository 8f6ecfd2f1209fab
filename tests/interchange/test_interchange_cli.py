"""The commands that convert, merge and compare adapters, on tiny checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_esft import ESFTConfig
from peft_esft.cli.main import main
from peft_esft.interchange import diff_adapters

from families import tiny_model
from oracle import config_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two adapters for it."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("deepseek_v2", torch.bfloat16).save_pretrained(folder / "base")
    for name, experts in (("a", [5, 1, 6]), ("b", [1, 2])):
        base = tiny_model("deepseek_v2", torch.bfloat16)
        base.name_or_path = str(folder / "base")
        selection = {"metric": "token", "num_experts": {"model.layers.1.mlp.experts": 8}}
        config = config_for(base, experts, init_weights=False, selection=selection, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(folder / name)
    return folder


def run(capsys, *arguments):
    """What a command prints as JSON."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_there_and_back(folders, tmp_path, capsys):
    base = folders / "base"
    run(capsys, "export", folders / "a", "--base", base, "--out", tmp_path / "official")
    record = run(capsys, "import", tmp_path / "official", "--base", base, "--out", tmp_path / "back")
    assert record["target_experts"] == {"model.layers.1.mlp.experts": [5, 1, 6]} and record["storage"] == "delta"
    run(capsys, "export", tmp_path / "back", "--base", base, "--out", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("official", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    rows = run(capsys, "import", tmp_path / "official", "--base", base, "--out", tmp_path / "rows", "--form", "rows")
    assert rows["storage"] == "rows"


def test_selections_alone(folders, tmp_path, capsys):
    base = folders / "base"
    run(capsys, "export", folders / "a", "--base", base, "--out", tmp_path / "cfg", "--selection-only")
    assert [path.name for path in (tmp_path / "cfg").iterdir()] == ["expert_cfg.json"]
    assert json.loads((tmp_path / "cfg" / "expert_cfg.json").read_text())["experts"] == {"1": [5, 1, 6]}
    run(capsys, "import", tmp_path / "cfg", "--base", base, "--out", tmp_path / "config", "--selection-only")
    model = tiny_model("deepseek_v2")
    model.name_or_path = str(base)
    model = get_peft_model(model, ESFTConfig.from_pretrained(str(tmp_path / "config")))
    assert model.peft_config["default"].target_experts == {"model.layers.1.mlp.experts": [5, 1, 6]}


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["layers.1.mlp.experts"]},
        {"exclude_modules": r".*\.1\..*"},
    ],
)
def test_experts_that_options_leave_out_are_not_shown(options, tmp_path, capsys):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    base = tiny_model("mixtral")
    kept, left_out = [f"model.layers.{index}.mlp.experts" for index in (0, 1)]
    config = ESFTConfig(target_experts={0: [1, 2], 1: [3]}, init_weights=False, **options)
    get_peft_model(base, config).save_pretrained(tmp_path / "a")
    get_peft_model(tiny_model("mixtral"), config_for(base, init_weights=False)).save_pretrained(tmp_path / "whole")
    assert run(capsys, "inspect", tmp_path / "a")["target_experts"] == {kept: [1, 2]}
    row = run(capsys, "diff", tmp_path / "a", tmp_path / "whole")["containers"][left_out]
    assert (row["first"], row["both"]) == ([], [])
    for name, more in (("official", []), ("selection", ["--selection-only"])):
        assert (
            main(["export", str(tmp_path / "a"), f"--base={tmp_path / 'base'}", f"--out={tmp_path / name}", *more])
            == 0
        )
        assert capsys.readouterr().out.startswith("2 experts in 1 layers written")
        assert json.loads((tmp_path / name / "expert_cfg.json").read_text())["experts"] == {"0": [1, 2]}


def test_a_selection_by_layers_is_exported_as_it_would_be_attached(tmp_path, capsys):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    for options, shown in (
        ({"layers_to_transform": [1]}, {"1": [3]}),
        (
            {"exclude_modules": ["layers.1.mlp.experts"]},
            {"0": [1, 2], "1": [3]},
        ),  # which path is layer 1's, a base says
    ):
        ESFTConfig(target_experts={0: [1, 2], 1: [3]}, **options).save_pretrained(str(tmp_path / "a"))
        assert run(capsys, "inspect", tmp_path / "a")["target_experts"] == shown
    run(capsys, "export", tmp_path / "a", "--base", tmp_path / "base", "--out", tmp_path / "cfg", "--selection-only")
    assert json.loads((tmp_path / "cfg" / "expert_cfg.json").read_text())["experts"] == {"0": [1, 2]}


def test_merge_and_compact(folders, tmp_path, capsys):
    run(capsys, "merge", folders / "base", folders / "a", tmp_path / "merged")
    base = PeftModel.from_pretrained(tiny_model("deepseek_v2", torch.bfloat16), str(folders / "a"))
    base.merge_and_unload().save_pretrained(tmp_path / "expected")
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert merged.keys() == expected.keys() and all(torch.equal(merged[key], expected[key]) for key in merged)
    record = run(capsys, "compact", folders / "a", "--out", tmp_path / "small")
    assert record["bytes"] * 2 == record["bytes_before"]
    assert main(["compact", str(folders / "a"), "--form", "int4", "--out", str(tmp_path / "smaller")]) == 0
    assert "MB, written to" in capsys.readouterr().out


def test_inspect_an_adapter(folders, tmp_path, capsys):
    record = run(capsys, "inspect", folders / "a")
    assert record["base"] == str(folders / "base") and record["storage"] == "delta" and record["rank"] is None
    assert record["bytes"] == 3 * 3 * 32 * 24 * 4
    assert main(["inspect", str(folders / "a")]) == 0
    text = capsys.readouterr().out
    # 3 of 8 experts are 12 of 32 characters.
    bar = f"model.layers.1.mlp.experts  {'#' * 12}{' ' * 20}  3 of 8: 5, 1, 6"
    assert bar in text
    assert "experts chosen by: metric token\n" in text
    assert "fp32 deltas, which can be trained further: 2 tensors, 0.03 MB" in text
    # An imported adapter knows the number of experts from its base alone.
    run(capsys, "export", folders / "a", "--base", folders / "base", "--out", tmp_path / "official")
    run(capsys, "import", tmp_path / "official", "--base", folders / "base", "--out", tmp_path / "back")
    assert main(["inspect", str(tmp_path / "back")]) == 0
    text = capsys.readouterr().out
    assert bar in text and "experts chosen by: not recorded" in text
    assert main(["inspect", str(tmp_path / "official")]) == 1
    assert "make an adapter of them: peft-esft import" in capsys.readouterr().err


def test_diff(folders, tmp_path, capsys):
    record = run(capsys, "diff", folders / "a", folders / "b")
    row = record["containers"]["model.layers.1.mlp.experts"]
    assert (row["first"], row["second"], row["both"]) == ([5, 6], [2], [1])
    deltas = [load_file(folders / name / "adapter_model.safetensors") for name in "ab"]
    key = "base_model.model.model.layers.1.mlp.experts.esft_{}"
    first, second = (
        torch.cat([d[key.format(name)][place].flatten() for name in ("gate_up_proj", "down_proj")]).double()
        for d, place in zip(deltas, (1, 0), strict=True)
    )
    assert row["weights"]["distance"] == pytest.approx(float((first - second).norm() / first.norm()))
    assert row["weights"]["cosine"] == pytest.approx(float(first @ second / first.norm() / second.norm()), abs=1e-9)
    assert main(["diff", str(folders / "a"), str(folders / "b")]) == 0
    # The bases are the same, though the fingerprints, of other experts' rows, are not.
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("model.layers.1.mlp.experts: only first [5, 6], only second [2], both [1] (distance ")
    same = diff_adapters(folders / "a", folders / "a")
    assert same["settings"] == {}
    assert same["containers"]["model.layers.1.mlp.experts"]["weights"]["distance"] == 0
    run(capsys, "compact", folders / "a", "--out", tmp_path / "int8", "--form", "int8")
    small = diff_adapters(folders / "a", tmp_path / "int8")
    assert small["settings"] == {"storage": ["delta", "int8"]}
    assert 0 < small["containers"]["model.layers.1.mlp.experts"]["weights"]["distance"] < 0.01
    run(capsys, "compact", folders / "a", "--out", tmp_path / "rows")
    assert diff_adapters(folders / "a", tmp_path / "rows")["containers"].popitem()[1]["weights"] is None


def test_diff_of_bases_selections_and_whole_modules(tmp_path, capsys):
    for name, scale, settings in (
        ("a", 1.0, {"train_shared_experts": True, "selection": {"metric": "token", "num_tokens": 5}}),
        ("b", 1.01, {"selection": {"metric": "gate", "num_tokens": 5}}),
        ("c", 1.0, {"train_shared_experts": True}),
    ):
        base = tiny_model("deepseek_v2")
        with torch.no_grad():
            base.model.layers[1].mlp.experts.down_proj.mul_(scale)
        config = config_for(base, init_weights=False, modules_to_save=["lm_head"], **settings)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if name == "c" and parameter.requires_grad:
                    parameter.mul_(-1)
        model.save_pretrained(tmp_path / name)
    record = diff_adapters(tmp_path / "a", tmp_path / "b")
    assert record["settings"] == {
        "selection.metric": ["token", "gate"],
        "train_shared_experts": [True, False],
    }
    assert record["other_base"] == ["model.layers.1.mlp.experts"]
    shared = "model.layers.1.mlp.shared_experts"
    assert record["containers"][shared]["first"] == [0] and not record["containers"][shared]["both"]
    assert not any(record["modules_to_save"].values())
    record = diff_adapters(tmp_path / "a", tmp_path / "c")
    assert record["other_base"] == []
    assert record["containers"][shared]["both"] == [0] and record["containers"][shared]["weights"]["distance"] == 2
    assert record["modules_to_save"]["different"] == ["base_model.model.lm_head.weight"]
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "trained over bases with other weights in 1 layers" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert "base_model.model.lm_head.weight: different" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "{base}", "missing", "{out}"], "missing"),
        (["merge", "missing", "{a}", "{out}"], "there is no folder 'missing'"),
        (["merge", "{base}", "{a}", "{a}"], "exists already"),
        (["import", "{a}", "--base", "{base}", "--out", "{out}"], "is an ESFT adapter already"),
        (["export", "missing", "--base", "{base}", "--out", "{out}"], "missing"),
        (["diff", "{a}", "{base}"], "is a model, not an ESFT adapter"),
    ],
)
def test_refusals_exit_with_1_and_say_why(arguments, message, folders, tmp_path, capsys):
    names = {"base": folders / "base", "a": folders / "a", "out": tmp_path / "out"}
    assert main([argument.format(**names) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("peft-esft: ") and message in output.err and not output.out
    assert not (tmp_path / "out").exists()
