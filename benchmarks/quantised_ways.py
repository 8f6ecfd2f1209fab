"""ESFT over experts in 4 bits beside what a user would pick instead: LoRA with bitsandbytes' `load_in_4bit`.

    python benchmarks/quantised_ways.py [--rounds 10] [--busy]

bitsandbytes leaves fused experts in bfloat16. Each way takes turns in one process, on one model with random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OlmoeConfig, OlmoeForCausalLM

from peft_esft import ESFTConfig, ESFTQuantizationConfig

from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results


CONFIG = OlmoeConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_experts=64,
    num_experts_per_tok=6,
)
TOKENS = (2, 256)
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
ESFT = ESFTConfig(target_experts={layer: list(range(8)) for layer in range(2)}, task_type="CAUSAL_LM")
LORA = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
BASES = {
    "bf16": None,
    "load_in_4bit": FOUR_BITS,
    "experts in nf4": ESFTQuantizationConfig(bits=4),
    "experts and linear layers in nf4": ESFTQuantizationConfig(bits=4, linears=FOUR_BITS),
}
WAYS: list[tuple[str, PeftConfig | None, str]] = [
    ("all weights", None, "bf16"),
    ("LoRA r 16 on attention", LORA, "bf16"),
    ("LoRA r 16 on attention", LORA, "load_in_4bit"),
    ("LoRA r 16 on attention", LORA, "experts and linear layers in nf4"),
    ("ESFT, 8 of 64 experts", ESFT, "bf16"),
    ("ESFT, 8 of 64 experts", ESFT, "experts in nf4"),
    ("ESFT, 8 of 64 experts", ESFT, "experts and linear layers in nf4"),
]


def step_of(model: nn.Module) -> Callable[[], None]:
    """Forward and backward pass of a batch."""
    ids = torch.randint(CONFIG.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    return call


def measure(folder: str, rounds: int) -> list[dict[str, object]]:
    calls, rows = {}, []
    for method, config, form in WAYS:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=BASES[form])
        size = sum(parameter.nbytes for parameter in base.parameters())
        own = sum(parameter.nbytes for name, parameter in base.named_parameters() if ".experts." in name)
        model = base.train() if config is None else get_peft_model(base, config).train()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        calls[f"{method}, {form}"] = step_of(model)
        rows.append(
            {
                "way": method,
                "base": form,
                "MB of the base": size / 1e6,
                "of which experts": own / 1e6,
                "trained weights": trained,
            }
        )
    times = time_in_turns(calls, rounds)
    reference = "LoRA r 16 on attention, bf16"
    for name, row in zip(calls, rows, strict=True):
        row |= {"ms of a step": 1000 * times.minima()[name], "over LoRA, bf16": times.ratio(name, reference)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        OlmoeForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(folder)
        rows = measure(folder, arguments.rounds)
    write_results(
        "quantised_ways",
        "Experts in 4 bits, and what a user would pick instead",
        f"An OLMoE of {CONFIG.num_hidden_layers} layers, hidden size {CONFIG.hidden_size}, {CONFIG.num_experts} "
        f"experts of {CONFIG.intermediate_size}; {TOKENS[0] * TOKENS[1]} tokens in a step of forward and backward "
        f"pass. Minima of {arguments.rounds} interleaved steps, medians of the ratios in brackets.",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
