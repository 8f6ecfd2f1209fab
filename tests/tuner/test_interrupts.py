"""An error or an interrupt in the middle: the model and the files are what they were."""

from __future__ import annotations

import contextlib
import copy
import linecache
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_esft import ESFTConfig, ESFTLayer, hotswap_adapter
from peft_esft.checkpoints import save_adapter
from peft_esft.interchange import compact, export_official, import_official, merge_checkpoint

from families import tiny_model
from listed import listed_model
from oracle import random_tokens


TOKENS = random_tokens()
TRACED = ("/peft_esft/", "/peft/", "/safetensors/")


class Interrupting:
    """Runs something and interrupts it at one of its steps: a line of our code, of PEFT's or of safetensors'.

    Attributes:
        steps: how many there were, up to the interrupt.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps = 0

    def __enter__(self) -> Interrupting:
        self._outer = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._outer)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    def _call(self, frame: Any, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        return self._line if any(name in file for name in TRACED) and "/tests/" not in file else None

    def _line(self, frame: Any, event: str, argument: Any) -> Callable[..., Any]:
        # Python 3.11 comes to the line of a `with` again before it leaves it, outside of what `__exit__` protects, as
        # is the line of a `try` in it. No interrupt of a user comes between there: those are looked for at calls.
        if event == "line" and not is_unprotected(frame.f_code.co_filename, frame.f_lineno):
            self.steps += 1
            if self.steps == self.at:
                raise KeyboardInterrupt
        return self._line


@cache
def is_unprotected(file: str, line: int) -> bool:
    return linecache.getline(file, line).lstrip().startswith(("with ", "try:"))


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that a user can see of a model."""
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    state: dict[str, Any] = {
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "layers": [
            (
                layer.path,
                layer.active_adapters,
                layer.merged_adapters,
                layer.adapters,
            )
            for layer in layers
        ],
        "configs": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
    }
    with torch.no_grad():
        tensors = {**model.state_dict(), "output": model(input_ids=TOKENS)[0]}
    return copy.deepcopy({**state, "tensors": {name: tensor.clone() for name, tensor in tensors.items()}})


def is_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    a, b = first["tensors"], second["tensors"]
    rest = [{key: value for key, value in state.items() if key != "tensors"} for state in (first, second)]
    return rest[0] == rest[1] and a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)


def is_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.is_meta or second.is_meta:
        return first.is_meta and second.is_meta and first.shape == second.shape
    return torch.equal(first, second)


def files_of(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass
class Material:
    """Two adapters, in memory and in files."""

    model: PeftModel
    folder: Path


@pytest.fixture(scope="module", params=["fused", "listed"])
def material(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    build = {"fused": lambda: tiny_model("olmoe"), "listed": listed_model}[request.param]
    paths = {"fused": [0, 1], "listed": [1]}[request.param]
    config = ESFTConfig(target_experts={path: [5, 1, 6] for path in paths}, init_weights=False)
    model = get_peft_model(build(), config, adapter_name="a").eval()
    model.add_adapter("b", ESFTConfig(target_experts={1: [2, 1]}, init_weights=False))
    model.add_adapter("c", ESFTConfig(target_experts={1: [7]}, rank=2, init_weights=False))
    for config in model.peft_config.values():
        config.init_weights = True  # what is loaded begins with zeros
    model.save_pretrained(folder)
    return Material(model, folder)


def points(steps: int, number: int) -> list[int]:
    """Some steps, spread over all; the first and the last among them."""
    return sorted({1 + round(place * (steps - 1) / (number - 1)) for place in range(number)})


def check_every_point(prepare, act, number: int, is_allowed=lambda model, error_state, before: False) -> None:
    """Interrupts `act(model)` at many of its steps; after each the model is what it was, or what it becomes."""
    model = prepare()
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Interrupting() as whole:
            act(model)
        after = state_of(model)
        assert not is_same(before, after)
        interrupted = 0
        for at in points(whole.steps, number):
            model = prepare()
            with Interrupting(at):
                try:
                    act(model)
                except KeyboardInterrupt:
                    interrupted += 1
            found = state_of(model)
            assert is_same(found, before) or is_same(found, after) or is_allowed(model, found, before), at
    assert interrupted > 0.9 * min(number, whole.steps)


OPERATIONS = {
    "merge": lambda model, folder: model.merge_adapter(),
    "merge safely": lambda model, folder: model.merge_adapter(["a", "b", "c"], safe_merge=True),
    "unmerge": lambda model, folder: model.unmerge_adapter(),
    "swap": lambda model, folder: hotswap_adapter(model, folder / "b", "a"),
    "swap in place": lambda model, folder: hotswap_adapter(model, folder / "a", "a"),
    "combine": lambda model, folder: model.base_model.add_weighted_adapter(["a", "b", "c"], [1.0, 2.0, 0.5], "d"),
    "freeze": lambda model, folder: model.base_model.freeze_adapter("a"),
    "set scale": lambda model, folder: model.base_model.set_scale("a", 3.0),
    "merge on": lambda model, folder: model.merge_adapter(["b"]),
    "unload": lambda model, folder: model.merge_and_unload(),
}
MERGED_BEFORE = {"unmerge", "merge on"}


@pytest.mark.parametrize("number", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupt_leaves_the_model_as_it_was(operation, number, material):
    def prepare():
        model = copy.deepcopy(material.model)
        if operation == "swap in place":
            for name, parameter in model.named_parameters():
                if name.endswith(".a"):
                    parameter.data.mul_(2)
        if operation in MERGED_BEFORE:
            model.merge_adapter(["a", "c"])
        return model

    check_every_point(prepare, lambda model: OPERATIONS[operation](model, material.folder), number)


def test_an_error_leaves_the_model_as_it_was_too(material, monkeypatch):
    """Not only interrupts: a weight that cannot be written."""
    model = copy.deepcopy(material.model)
    before = state_of(model)
    layer = [module for module in model.modules() if isinstance(module, ESFTLayer)][-1]
    weight = type(layer.weights["down_proj"])
    write, calls = weight.write, []

    def failing(self, *arguments):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("no space")
        write(self, *arguments)

    monkeypatch.setattr(weight, "write", failing)
    with pytest.raises(RuntimeError, match="no space"):
        model.merge_adapter()
    assert is_same(state_of(model), before)


@pytest.mark.parametrize("number", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_loading_changes_nothing_but_the_new_adapter_which_can_be_deleted(settings, number, material):
    """PEFT attaches the adapter before it reads the weights, in a function of its own: the interrupted one stays."""

    def load(model):
        model.load_adapter(str(material.folder / "b"), "new", **settings)

    complete = copy.deepcopy(material.model)
    load(complete)
    after = state_of(complete)

    def is_harmless(model, found, before):
        assert model.active_adapters == ["a"] and torch.equal(found["tensors"]["output"], before["tensors"]["output"])
        model.delete_adapter("new")
        if not is_same(state_of(model), before):
            return False
        load(model)
        return is_same(state_of(model), after)

    check_every_point(lambda: copy.deepcopy(material.model), load, number, is_harmless)


@pytest.mark.parametrize("number", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_a_base_can_be_used_after_its_first_adapter_was_interrupted(number, material):
    base = copy.deepcopy(material.model).unload()
    expected = state_of(PeftModel.from_pretrained(copy.deepcopy(base), material.folder / "a").eval())
    with Interrupting() as whole:
        PeftModel.from_pretrained(copy.deepcopy(base), material.folder / "a")
    weights = dict(base.named_parameters())
    for at in points(whole.steps, number):
        model = copy.deepcopy(base)
        with Interrupting(at):
            try:
                PeftModel.from_pretrained(model, material.folder / "a")
            except KeyboardInterrupt:
                pass
            else:
                continue
        # The adapter may be attached, and some of its weights read; the base's are what they were.
        found = {name.replace(".base_layer", ""): value for name, value in model.named_parameters()}
        assert all(torch.equal(found[name], value) for name, value in weights.items()), at
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = PeftModel.from_pretrained(model, material.folder / "a").eval()
        assert is_same(state_of(again), expected), at


@pytest.mark.parametrize("number", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_wrapping_that_is_interrupted_leaves_the_base_alone(number):
    def wrap(model):
        get_peft_model(
            model,
            ESFTConfig(
                target_experts={0: [1], 1: [2, 3]}, modules_to_save=["lm_head"], train_non_expert_modules=False
            ),
        )

    base = tiny_model("olmoe")
    before = state_of(base)
    complete = copy.deepcopy(base)
    with Interrupting() as whole:
        wrap(complete)
    outside = 0
    for at in points(whole.steps, number):
        model = copy.deepcopy(base)
        with Interrupting(at):
            try:
                wrap(model)
            except KeyboardInterrupt:
                pass
            else:
                continue
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            outside += 1  # PEFT's own steps after the adapter is attached
            continue
        assert is_same(state_of(model), before), at
    assert outside < number / 2


@pytest.mark.parametrize("number", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exists", [True, False])
def test_saving_leaves_the_old_files_or_the_new_ones(exists, number, material, tmp_path):
    def prepare():
        return copy.deepcopy(material.model)

    changed = prepare()
    for parameter in changed.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    before_state = state_of(changed)
    folder = tmp_path / "saved"
    if exists:
        save_adapter(material.model, folder)
    old = files_of(tmp_path)
    other = tmp_path.parent / f"{tmp_path.name}_whole"
    with Interrupting() as whole:
        save_adapter(changed, other / "saved")
    new = files_of(other)
    assert old != new
    for at in points(whole.steps, number):
        with contextlib.suppress(KeyboardInterrupt), Interrupting(at):
            save_adapter(changed, folder)
        found = {
            name: content for name, content in files_of(tmp_path).items() if not name.startswith("saved.previous")
        }
        assert found in (old, new), at
        assert is_same(state_of(changed), before_state), at
        if found == new and exists:
            save_adapter(material.model, folder)
        elif found == new:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A base, an adapter and an official checkpoint in folders."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base = tiny_model("olmoe")
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, ESFTConfig(target_experts={0: [5, 1], 1: [2]}, init_weights=False))
    model.save_pretrained(folder / "adapter")
    export_official(folder / "adapter", folder / "base", folder / "official")
    return folder


CONVERSIONS = {
    "merge": lambda folder, out: merge_checkpoint(folder / "base", folder / "adapter", out),
    "compact": lambda folder, out: compact(folder / "adapter", out, form="int8"),
    "export": lambda folder, out: export_official(folder / "adapter", folder / "base", out),
    "import": lambda folder, out: import_official(folder / "official", folder / "base", out),
}


# A file that is opened when the interrupt comes is closed when Python finds that nobody has it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("number", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_converting_leaves_a_whole_folder_or_none(conversion, number, checkpoints, tmp_path):
    convert = CONVERSIONS[conversion]
    sources = files_of(checkpoints)
    with Interrupting() as whole:
        convert(checkpoints, tmp_path / "whole")
    complete = files_of(tmp_path / "whole")
    for at in points(whole.steps, number):
        place = tmp_path / str(at)
        (place / "out").mkdir(parents=True)
        with contextlib.suppress(KeyboardInterrupt), Interrupting(at):
            convert(checkpoints, place / "out")
        assert files_of(place) in (
            {"out": None},
            {"out": None, **{f"out/{name}": content for name, content in complete.items()}},
        ), at
    assert files_of(checkpoints) == sources
