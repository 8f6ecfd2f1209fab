"""PEFT's tests of config classes, on `ESFTConfig`."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, PeftType

from peft_esft import ESFTConfig

from harness import Declared, peft_tests, transplant


test_config = peft_tests("test_config")

CONFIGS = [
    (ESFTConfig, {}),
    (ESFTConfig, {"target_experts": {0: [3, 1], "model.layers.1.mlp.experts": [2]}, "selection": {"metric": "gate"}}),
]

DECLARED = {
    "test_save_pretrained_with_target_modules": Declared(
        "ESFT has target_experts in the place of target_modules", TypeError
    ),
}

TestPeftConfig = transplant(
    test_config.TestPeftConfig,
    tables={"config_class, mandatory_kwargs": CONFIGS, "config_class": [ESFTConfig]},
    declared=DECLARED,
    # Of the types that are registered, some need packages that are not installed.
    written_for={"test_from_peft_type": {"PeftType": [PeftType.ESFT]}},
)


@pytest.fixture(autouse=True)
def _a_config_of_another_method(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA adapter on disk in the place of the one that PEFT's tests ask a hub for."""
    folder: Path = tmp_path_factory.mktemp("lora")
    LoraConfig().save_pretrained(folder)
    monkeypatch.setattr(test_config, "PEFT_MODELS_TO_TEST", [(str(folder), None)])
