"""Adapters that are changed in their files, and loaded or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft import PeftModel

from peft_esft import ESFTLayer


WEIGHTS = "adapter_model.safetensors"
REFUSALS = (ValueError, NotImplementedError, FileNotFoundError)


def copied(adapter, folder):
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return Path(folder)


def rewrite_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def snapshot(model):
    return {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()}


def load_or_refuse(base, folder):
    """Loads an adapter; returns the error if it is refused, with the base as it was."""
    before = snapshot(base)
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except REFUSALS as error:
        assert not any(isinstance(module, ESFTLayer) for module in base.modules())
        assert snapshot(base) == before
        assert not hasattr(base, "peft_config")
        return error
    model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return None
