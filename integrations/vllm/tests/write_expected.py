"""Writes bases, adapters and the tokens that the library answers with. Runs in the library's environment.

usage: write_expected.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from peft_esft import ESFTConfig
from peft_esft.cli import main as command_line
from peft_esft.interchange import compact


EMBEDDED = Path(__file__).parents[3] / "examples" / "tiny_moe"
NEW_TOKENS = 16
TEXTS = ("NAME\nls - list directory contents\n\nSYNOPSIS\n", "In the beginning God created", "def main(argv):\n    ",
         "The quick brown fox jumps over", "Der Befehl")  # fmt: skip
SHARED_START = "And the LORD said unto Moses, Speak unto the children of Israel. " * 3
SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    "tie_word_embeddings": False, "initializer_range": 0.3,
}  # fmt: skip
BUILT = {
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, intermediate_size=64, moe_intermediate_size=40, num_experts=16, num_experts_per_tok=4
    ),
    "mixtral": MixtralConfig(
        **SIZES, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    ),
}
ADAPTERS: dict[str, dict[str, tuple[dict[int, list[int]], dict[str, Any], str]]] = {
    "olmoe": {
        "a": ({0: [1, 30, 62], 1: [5], 2: [0, 7, 8, 9, 21, 22, 40, 63]}, {}, "delta"),
        "b": ({0: [2, 30], 3: [9, 3, 17, 60]}, {"rank": 4, "alpha": 6, "use_rslora": True}, "delta"),
        "c": ({1: [5, 6, 11], 2: [7], 3: [41, 17]}, {}, "int4"),
        "d": ({0: [44, 45], 2: [13]}, {}, "rows"),
    },
    "qwen3_moe": {
        "a": ({0: [1, 3], 1: [0, 2, 5]}, {}, "rows"),
        "b": ({0: [3, 9, 15], 1: [7]}, {}, "int8"),
        "c": ({1: [5, 12]}, {}, "int1"),
    },
    "deepseek_v2": {
        "a": ({1: [1, 30, 62], 2: [5, 6], 4: [0, 7, 8, 9, 21, 22, 40, 63]}, {}, "delta"),
        "b": ({1: [2], 3: [9, 3, 17, 60]}, {}, "int8"),
        "c": ({2: [5, 11], 4: [7, 40]}, {"rank": 3}, "delta"),
    },
    "mixtral": {
        "a": ({0: [1, 3], 1: [0, 2, 5]}, {}, "delta"),
        "b": ({0: [7], 1: [2, 5]}, {"rank": 4}, "delta"),
        "c": ({0: [0, 1, 2], 1: [7]}, {}, "int1"),
    },
}
"""Experts by layer, fields of the config, and the form of the file, of each adapter of each base."""


def save_base(name: str, folder: Path) -> None:
    """A small base whose output head is a tensor of its own: vLLM ignores that these families may tie it."""
    AutoTokenizer.from_pretrained(EMBEDDED / "model").save_pretrained(folder)
    if name in BUILT:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(BUILT[name]).float().save_pretrained(folder)
        return
    source = EMBEDDED / {"olmoe": "model", "deepseek_v2": "deepseek"}[name]
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_adapter(base: Path, out: Path, experts: dict[int, list[int]], fields: dict[str, Any], form: str) -> None:
    """An adapter of random deltas, large enough to change what is answered."""
    model = get_peft_model(load(base), ESFTConfig(target_experts=experts, task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(sum(map(sum, experts.values())))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".esft_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.6 if "rank" in fields else 0.3))
    model.save_pretrained(out if form == "delta" else out.with_suffix(".delta"))
    if form != "delta":
        compact(out.with_suffix(".delta"), out, form, base=load(base))  # rows in fp32, as they are served


def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy tokens after each prompt, each alone."""
    return [
        model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip


def save_gpt_oss(folder: Path) -> None:
    """A base whose experts vLLM keeps in a class of their own."""
    config = GptOssConfig(
        **SIZES, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED / "model").save_pretrained(folder)


def save_refused(base: Path, out: Path) -> None:
    """Adapters that a server of narrow slots must refuse, each for another reason."""
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2)
    get_peft_model(load(base), lora).save_pretrained(out / "lora")
    wide = {"target_experts": {1: list(range(9))}, "task_type": "CAUSAL_LM"}
    get_peft_model(load(base), ESFTConfig(**wide)).save_pretrained(out / "wide")
    whole = ESFTConfig(target_experts={1: [0]}, task_type="CAUSAL_LM", train_non_expert_modules=True)
    get_peft_model(load(base), whole).save_pretrained(out / "whole")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    expected: dict[str, Any] = {}
    for name, adapters in ADAPTERS.items():
        base = out / "bases" / name
        base.mkdir(parents=True)
        save_base(name, base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        prompts = [tokenizer(SHARED_START * (k % 2) + text)["input_ids"] for k, text in enumerate(TEXTS)]
        expected[name] = {"prompts": prompts, "base": answers(load(base), prompts)}
        for adapter, (experts, fields, form) in adapters.items():
            folder = out / "adapters" / name / adapter
            save_adapter(base, folder, experts, fields, form)
            expected[name][adapter] = answers(PeftModel.from_pretrained(load(base), folder).eval(), prompts)
    base, adapter = out / "bases" / "qwen3_moe", out / "adapters" / "qwen3_moe" / "b"
    assert command_line(["merge", str(base), str(adapter), str(out / "merged")]) == 0
    save_gpt_oss(out / "bases" / "gpt_oss")
    save_refused(out / "bases" / "olmoe", out / "refused")
    shutil.copytree(out / "adapters" / "olmoe" / "a", out / "refused" / "broken")
    (out / "refused" / "broken" / "adapter_model.safetensors").write_bytes(b"\x10")
    (out / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
