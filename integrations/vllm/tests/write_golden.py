"""Writes `golden/`: one small adapter in each form of the file, and the values that both readers must find in it.

Runs in the library's environment; only a change of the file format calls for it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from peft_esft import ESFTConfig
from peft_esft.interchange import compact
from peft_esft.interchange.adapter import AdapterFolder
from peft_esft.interchange.base import Base


GOLDEN = Path(__file__).parent / "golden"
EXPERTS = {0: [3, 0], 1: [1, 2, 0]}
RANKS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 2},
    "alpha": {"rank": 2, "alpha": 6},
    "rslora": {"rank": 4, "alpha": 6, "use_rslora": True},
}


def base() -> OlmoeForCausalLM:
    """A base with an odd width, so that rows of few bits end within a byte."""
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=8, hidden_size=6, intermediate_size=5, num_hidden_layers=2, num_attention_heads=1,
            num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def save(out: Path, **fields: Any) -> None:
    """An adapter whose deltas are multiples of 1/64, so that products and sums are exact everywhere."""
    model = get_peft_model(base(), ESFTConfig(target_experts=EXPERTS, task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".esft_" in name:
                parameter.copy_(torch.randint(-64, 64, parameter.shape) / 64)
    model.save_pretrained(out)


def values(folder: Path) -> dict[str, Tensor]:
    """What the library finds in an adapter: its deltas, or its effective weights."""
    adapter = AdapterFolder(folder)
    found = {}
    for change in adapter.changes(Base(base())):
        rows = adapter.files.read(change.keys["_rows"]) if "_rows" in change.keys else change.delta()
        found[f"{folder.name}/{change.container.path}/{change.weight.name}"] = rows
    return found


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary)
        save(kept / "delta")
        for name, fields in RANKS.items():
            save(kept / name, **fields)
        for form in ("rows", "int8", "int4", "int1"):
            compact(kept / "delta", kept / form, form, base=base())
        for folder in kept.iterdir():
            (GOLDEN / folder.name).mkdir(parents=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(folder / file, GOLDEN / folder.name / file)
    expected = {key: value for folder in sorted(GOLDEN.iterdir()) for key, value in values(folder).items()}
    save_file(expected, GOLDEN / "expected.safetensors")


if __name__ == "__main__":
    main()
