"""Inference with an unmerged and a merged adapter over the base alone.

    python benchmarks/inference.py [--busy]

All take turns in one process on the same inputs; reported are the ratio of the fastest calls and, in brackets,
the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy

import torch
from peft import LoraConfig, get_peft_model

from peft_esft import ESFTConfig, find_experts

from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results
from scoring import build_model


TRAINED = 8  # of 64 experts in each layer
CASES = {"prefill 1 x 1,024": (1, 1024, 15), "decode 1 x 1": (1, 1, 201), "decode 8 x 1": (8, 1, 101)}


def measure(case: str, dtype: torch.dtype) -> dict[str, object]:
    base = build_model().to(dtype)
    selection = {path: list(range(0, 64, 64 // TRAINED)) for path in find_experts(base)}
    config = ESFTConfig(target_experts=selection, inference_mode=True, init_weights=False)
    unmerged = get_peft_model(copy.deepcopy(base), config).eval()
    merged = copy.deepcopy(unmerged).merge_and_unload()
    targets = [f"{path}.{name}" for path in selection for name in ("gate_up_proj", "down_proj")]
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, target_parameters=targets)).eval()
    rows, length, rounds = CASES[case]
    tokens = torch.randint(4096, (rows, length))
    ways = {"base": base, "unmerged": unmerged, "merged": merged}
    calls = {name: lambda m=m: m(input_ids=tokens) for name, m in ways.items()}
    with torch.inference_mode():
        times = time_in_turns(calls, rounds)
        # So slow that it would take most of the time, and push everything out of the caches.
        of_lora = time_in_turns({"base": calls["base"], "LoRA r 16": lambda: lora(input_ids=tokens)}, 5)
    result: dict[str, object] = {"case": case, "dtype": str(dtype).removeprefix("torch.")}
    for name in ("unmerged", "merged"):
        result[name] = times.ratio(name, "base")
    result["LoRA r 16"] = of_lora.ratio("LoRA r 16", "base")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clock_arguments(parser)
    set_clock(parser.parse_args())
    rows = [measure(case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in CASES]
    setting = (
        f"OLMoE-like model of benchmarks/scoring.py, {TRAINED} of 64 experts in each layer adapted, "
        "base = 1. LoRA: PEFT's, unmerged, through "
        "target_parameters."
    )
    write_results("inference", "Inference with an adapter over the base alone", setting, rows, versions())


if __name__ == "__main__":
    main()
