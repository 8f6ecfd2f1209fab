"""Every method of PEFT's common tester, on tiny checkpoints of several families and on toy models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_esft import ESFTConfig

from harness import Declared, peft_tests
from toys import BLOCKS, FAMILIES, FromPretrained, write_checkpoint


testing_common = peft_tests("testing_common")
testing_utils = peft_tests("testing_utils")

SELECTION = {0: [5, 1, 2, 0, 7, 6, 3], 1: [0, 3, 4, 7, 2, 6]}
"""Most experts, so that the few tokens of PEFT's inputs reach them, but not all."""

OWN_ARGUMENTS = ("model_id", "config_cls", "config_kwargs")

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "_test_save_pretrained": [{}, {"safe_serialization": False}],
    "_test_save_pretrained_selected_adapters": [{}, {"safe_serialization": False}],
    "_test_add_adapter_no_autocast_adapter_dtype": [{"dtype": torch.float16}, {"dtype": torch.bfloat16}],
    "_test_generate_pos_args": [{"raises_err": False}],
    "_test_passing_input_embeds_works": [{"test_name": ""}],
    "_test_training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
}
"""The values with which PEFT's own test files call a method that takes more than a model and a config."""

TAKES_THE_PLACE_OF = {
    "_test_mixed_adapter_batches": "LoraConfig",
    "_test_generate_with_mixed_adapter_batches_and_beam_search": "LoraConfig",
    "_test_weighted_combination_of_adapters": "IA3Config",
}
"""Methods that skip all but the named config. They are run to their end, to notice when ESFT passes them."""

DECLARED = {
    "_test_training_prompt_learning_tasks": Declared("for prompt learning only"),
    "_test_adding_multiple_adapters_with_bias_raises": Declared(
        "experts are trained whole: there is no `bias` option"
    ),
}

DECLARED_FOR_TOYS = {
    "_test_disable_adapter": Declared("a toy does not generate", AttributeError),
    "_test_mixed_adapter_batches": Declared("a toy takes X, not input_ids", KeyError),
    "_test_generate_with_mixed_adapter_batches_and_beam_search": Declared("a toy takes X, not input_ids", KeyError),
    "_test_generate": Declared("a toy does not generate", AttributeError),
    "_test_generate_half_prec": Declared("a toy does not generate", AttributeError),
    "_test_generate_pos_args": Declared("a toy takes X, not input_ids", KeyError),
    "_test_passing_input_embeds_works": Declared("a toy has no embeddings", AttributeError),
    "_test_prepare_for_training": Declared("a toy has no embeddings", AttributeError),
    "_test_training_gradient_checkpointing": Declared("a toy has no gradient checkpointing"),
}


def methods() -> list[str]:
    """The tests of the common tester, found by their arguments: the rest of its methods are called by these."""
    found = inspect.getmembers(testing_common.PeftCommonTester, inspect.isfunction)
    return [
        name
        for name, function in found
        if name.startswith("_test_") and set(OWN_ARGUMENTS) <= set(inspect.signature(function).parameters)
    ]


def cases() -> list[Any]:
    rows = []
    for model in FAMILIES + list(BLOCKS):
        for name in methods():
            declared = (DECLARED_FOR_TOYS.get(name) if model in BLOCKS else None) or DECLARED.get(name)
            for variant in VARIANTS.get(name, [{}]):
                label = "-".join([model, name.removeprefix("_test_"), *map(str, variant.values())])
                rows.append(pytest.param(model, name, variant, marks=[declared.mark] if declared else [], id=label))
    return rows


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        write_checkpoint(family, str(folder / family))
        testing_utils._HUB_MODEL_ACCESSES[str(folder / family)] = 1  # as if loaded before: not looked for on a hub
    return folder


class Decoder(testing_common.PeftCommonTester):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        }


class ToyModel(testing_common.PeftCommonTester):
    transformers_class = FromPretrained

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        return {"X": torch.arange(90).view(9, 10)}


@pytest.mark.parametrize(("model", "method", "variant"), cases())
def test_common(
    model: str, method: str, variant: dict[str, Any], checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"target_experts": SELECTION, "init_weights": False}
    tester, model_id = ToyModel(), model
    if model in FAMILIES:
        tester, model_id = Decoder(), str(checkpoints / model)
        settings["task_type"] = "CAUSAL_LM"
    if method in TAKES_THE_PLACE_OF:
        monkeypatch.setattr(testing_common, TAKES_THE_PLACE_OF[method], ESFTConfig)
    getattr(tester, method)(model_id=model_id, config_cls=ESFTConfig, config_kwargs=settings, **variant)


def test_every_declared_method_exists() -> None:
    assert methods()
    assert (VARIANTS.keys() | TAKES_THE_PLACE_OF.keys() | DECLARED.keys() | DECLARED_FOR_TOYS.keys()) <= set(methods())
