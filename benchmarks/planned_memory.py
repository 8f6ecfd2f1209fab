"""What `peft-esft plan` estimates beside what a training step takes, on the CPU, or on a GPU if there is one.

    python benchmarks/planned_memory.py

On a GPU the peak is CUDA's own count of allocated bytes, at the sizes of real layers. On the CPU it is what is held
between steps and the allocations of a step (torch's profiler), in small sizes.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers.training_args import OptimizerNames

from peft_esft import ESFTConfig, find_experts, quantize_experts
from peft_esft.scoring.memory_estimate import Setup, estimate
from peft_esft.scoring.model_sizes import ModelSizes

from reporting import peak_of, versions, write_results


LATENT = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMoE": ("Olmoe", {"num_experts": 32}),
    "gpt-oss": ("GptOss", {"num_local_experts": 16, "head_dim": 32}),
    "DeepSeek-V2": (
        "DeepseekV2",
        {"n_routed_experts": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"topk_method": "greedy", **LATENT},
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, fused": {"optim": "adamw_torch_fused"},
    "3 in 10 experts": {"share": 0.3},
    "rank 8": {"rank": 8, "share": 0.5},
    "int8 base": {"base": "int8"},
    "NF4 base": {"base": "nf4"},
    "NF4 base, 8-bit AdamW": {"base": "nf4", "optim": "adamw_8bit"},
    "many tokens": {"tokens": 1024, "rank": 8},
    "many tokens, accumulated": {"tokens": 1024, "rank": 8, "accumulates": True},
}


def build(shape: str, device: str) -> nn.Module:
    """A model with random weights in bf16: of real width on a GPU, a small one on the CPU."""
    width, inside = (2048, 1024) if device == "cuda" else (256, 128)
    family, own = SHAPES[shape]
    fields = {
        "hidden_size": width,
        "intermediate_size": inside,
        "moe_intermediate_size": inside,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "vocab_size": 8 * width,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config = getattr(transformers, f"{family}Config")(**fields | own)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(device, torch.bfloat16)


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that transformers' `Trainer` would take under this name."""
    if OptimizerNames(name) == OptimizerNames.ADAMW_8BIT:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters)
    return torch.optim.AdamW(parameters, foreach=name == "adamw_torch", fused=name == "adamw_torch_fused")


def measure(shape: str, settings: dict[str, Any], device: str) -> tuple[float, float]:
    """Bytes that a training step takes, and that are planned."""
    model: Any = build(shape, device)
    sizes = ModelSizes.of(model)
    settings = {"tokens": 64, "share": 0.1} | settings
    chosen = max(1, round(settings["share"] * sizes.num_experts))
    setup = Setup(**settings | {"share": chosen / sizes.num_experts})
    if setup.base in ("int8", "nf4"):
        model = quantize_experts(model, bits=8 if setup.base == "int8" else 4)
    experts = {path: list(range(chosen)) for path in find_experts(model)}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model = get_peft_model(model, ESFTConfig(target_experts=experts, rank=setup.rank)).train()
    model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(setup.optim, trained)
    tokens = torch.randint(2, sizes.vocab_size, (1, setup.tokens), device=device)

    def step() -> None:
        if not setup.accumulates:
            optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated(), estimate(sizes, setup).total
    if not setup.accumulates:
        optimizer.zero_grad()
    held = [*model.parameters(), *model.buffers()]
    held += [parameter.grad for parameter in trained if parameter.grad is not None]
    held += [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    planned = estimate(sizes, setup)
    if setup.optim == "adamw_8bit":
        # On the CPU, not on a GPU, bitsandbytes' step makes so many bytes for each parameter of a weight at a time.
        planned = replace(planned, copies=20 * max(parameter.numel() for parameter in trained))
    return sum(tensor.nbytes for tensor in held) + peak_of(step), planned.total


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for shape in SHAPES:
        for name, settings in SETTINGS.items():
            measured, planned = measure(shape, settings, device)
            rows.append(
                {
                    "shape": shape,
                    "settings": name,
                    "measured (MB)": measured / 1e6,
                    "planned (MB)": planned / 1e6,
                    "error (%)": 100 * (planned / measured - 1),
                }
            )
    place = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    write_results(
        "planned_memory" if device == "cpu" else "planned_memory_gpu",
        "The plan's total against the peak of a training step",
        f"{place}, bf16, 4 layers, 64 tokens (many: 1,024), gradient checkpointing, 1 in 10 experts (rank 8: 5 in 10, "
        "many tokens: 1 in 10).",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
