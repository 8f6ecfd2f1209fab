"""The zoo itself: every architecture is found, builds, runs, trains and survives saving, and its experts are found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_esft import find_experts

from oracle import task_loss
from zoo import CONFIGS, EXACT, GROUPS, VARIANTS, build, family, inputs_for, model_types, output_of


MODELS = [*model_types(), *VARIANTS]
FUSED = [name for name in MODELS if family(name).group in "AB"]
OTHER = {
    "dbrx": ("DbrxExperts", 3),
    "doge": ("DogeCDMoE", 3),
    "jetmoe": ("JetMoeParallelExperts", 12),  # two for each of 3 layers, in the MLP and in the attention
    "llama4": ("Llama4TextExperts", 3),
    "nllb_moe": ("NllbMoeExperts", 6),
    "switch_transformers": ("SwitchTransformersExperts", 6),
    "vitpose_backbone": ("VitPoseNaiveMoe", 3),
}
"""The class that holds the experts where they are not fused, and how many of it a model has."""

FEWER_EXPERTS = {("dots3_note", "model.vision_tower.blocks.1.mlp.experts"): 4}
IMAGE_EXPERTS = ["dots3_note", "ernie4_5_vl_moe"]


def experts_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What holds routed experts, by the name of its class alone."""
    names = re.compile("|".join(name for name, _ in OTHER.values()) + r"|(?!InklingShared)\w+Experts")
    return {path: module for path, module in model.named_modules() if names.fullmatch(type(module).__name__)}


def has_gradient(module: nn.Module) -> bool:
    return any(weight.grad is not None and weight.grad.any() for weight in module.parameters())


def run(model: PreTrainedModel, **settings: object) -> Tensor:
    with torch.no_grad():
        return output_of(model(**inputs_for(model, **settings)))


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="has fewer architectures")
def test_the_walk_finds_all_architectures() -> None:
    listed = {name for names in GROUPS.values() for name in names.split()}
    assert len(listed) == 73
    assert listed - set(model_types()) == set()


def test_no_entry_is_for_a_model_that_does_not_exist() -> None:
    assert set(CONFIGS) - set(MODELS) == set()


@pytest.mark.parametrize("model_type", MODELS)
def test_runs_and_trains(model_type: str) -> None:
    model = build(model_type)
    output = output_of(model(**inputs_for(model)))
    assert output.isfinite().all() and output.std() > 0.01
    torch.testing.assert_close(output, run(model))
    assert not torch.equal(output, run(model, seed=1))
    assert run(model, rows=3, length=5).isfinite().all()
    task_loss(output).backward()
    modules = experts_modules(model)
    assert len(modules) >= 2
    reached = {path for path, module in modules.items() if has_gradient(module)}
    unreached = set(modules) - reached
    assert not unreached or (model_type in IMAGE_EXPERTS and all("vision" in path for path in unreached))


@pytest.mark.parametrize("model_type", IMAGE_EXPERTS)
def test_images_reach_the_experts_for_images(model_type: str) -> None:
    model = build(model_type)
    task_loss(output_of(model(**inputs_for(model, images=True)))).backward()
    assert all(has_gradient(module) for module in experts_modules(model).values())


@pytest.mark.parametrize("model_type", MODELS)
def test_nothing_is_random(model_type: str) -> None:
    model, again = build(model_type), build(model_type)
    assert torch.equal(run(model), run(again))
    torch.testing.assert_close(run(model.train()), run(again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", MODELS)
def test_is_what_a_load_gives(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(model_type, dtype)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    torch.testing.assert_close(run(loaded), run(model))


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_experts_are_found(model_type: str) -> None:
    model = build(model_type)
    containers = find_experts(model)
    assert {place.path for c in containers.values() for place in c.places} == set(experts_modules(model))
    for path, container in containers.items():
        assert container.num_experts == FEWER_EXPERTS.get((model_type, path), EXACT["num_experts"])
        weights = [shape for shape in container.weight_shapes.values() if len(shape) == 2]
        assert len(weights) == 2
        assert all(rows != columns for rows, columns in weights)


@pytest.mark.parametrize("model_type", sorted(set(MODELS) - set(FUSED)))
def test_other_experts_are_as_listed(model_type: str) -> None:
    name, count = OTHER[model_type]
    assert [type(module).__name__ for module in experts_modules(build(model_type)).values()] == [name] * count
