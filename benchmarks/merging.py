"""Memory and time of merging an adapter into a checkpoint, over merging in memory.

    python benchmarks/merging.py

Each way runs in a process of its own; reported is the peak of its resident memory above what it had after importing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM

from peft_esft import ESFTConfig, find_experts

from reporting import versions, write_results


LAYERS, EXPERTS, WIDTH, TRAINED = 8, 32, 512, 2
MEASURE = """
import pathlib, re, sys, time
import torch
import peft_esft.interchange as interchange
from peft import PeftModel
from transformers import AutoModelForCausalLM, OlmoeForCausalLM
def memory(what):
    # Not ru_maxrss, which a process inherits from the one that started it.
    return 1024 * int(re.search(what + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")
before, started = memory("VmRSS"), time.perf_counter()
way, base, adapter, out = sys.argv[1:5]
if way == "merge_checkpoint":
    interchange.merge_checkpoint(base, adapter, out)
else:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(out, max_shard_size="100MB")
print(memory("VmHWM") - before, time.perf_counter() - started)
"""


def prepare(folder: Path) -> dict[str, float]:
    """Writes a base and an adapter; returns the sizes of the files in MB."""
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="100MB")
    selection = {path: list(range(TRAINED)) for path in find_experts(model)}
    get_peft_model(model, ESFTConfig(target_experts=selection, init_weights=False)).save_pretrained(folder / "adapter")
    shards = [path.stat().st_size / 1e6 for path in (folder / "base").glob("*.safetensors")]
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
    return {"base (MB)": sum(shards), "largest shard (MB)": max(shards), "adapter (MB)": adapter}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = prepare(folder)
        for way in ("merge_checkpoint", "merge_and_unload, save_pretrained"):
            arguments = [way, str(folder / "base"), str(folder / "adapter"), str(folder / way)]
            command = [sys.executable, "-c", MEASURE, *arguments]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            peak, seconds = map(float, output.split())
            rows.append({"way": way, **sizes, "peak memory (MB)": peak / 1e6, "seconds": seconds})
    setting = (
        f"OLMoE-like, bf16: {LAYERS} layers of {EXPERTS} experts, {TRAINED} of them trained in each; width {WIDTH}."
    )
    write_results("merging", "Merging an adapter into a checkpoint", setting, rows, versions())


if __name__ == "__main__":
    main()
