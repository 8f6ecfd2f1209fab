"""Inference with an unmerged and a merged adapter over the base alone.

    python benchmarks/inference.py

The three take turns in one process on the same inputs; reported are the ratio of the fastest calls and, in brackets,
the median of the ratios within a round.
"""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model

from peft_esft import ESFTConfig, find_experts

from reporting import time_in_turns, versions, write_results
from scoring import build_model


TRAINED = 8  # of 64 experts in each layer
CASES = {"prefill 1 x 1,024": (1, 1024, 15), "decode 1 x 1": (1, 1, 201), "decode 8 x 1": (8, 1, 101)}


@torch.inference_mode()
def measure(case: str, dtype: torch.dtype) -> dict[str, object]:
    base = build_model().to(dtype)
    selection = {path: list(range(0, 64, 64 // TRAINED)) for path in find_experts(base)}
    config = ESFTConfig(target_experts=selection, inference_mode=True, init_weights=False)
    unmerged = get_peft_model(copy.deepcopy(base), config).eval()
    merged = copy.deepcopy(unmerged).merge_and_unload()
    rows, length, rounds = CASES[case]
    tokens = torch.randint(4096, (rows, length))
    calls = {
        name: lambda m=m: m(input_ids=tokens)
        for name, m in (("base", base), ("unmerged", unmerged), ("merged", merged))
    }
    times = time_in_turns(calls, rounds)
    result: dict[str, object] = {"case": case, "dtype": str(dtype).removeprefix("torch.")}
    for name in ("unmerged", "merged"):
        result[name] = times.ratio(name, "base")
    return result


def main() -> None:
    rows = [measure(case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in CASES]
    setting = f"OLMoE-like model of benchmarks/scoring.py, {TRAINED} of 64 experts in each layer adapted, base = 1."
    write_results("inference", "Inference with an adapter over the base alone", setting, rows, versions())


if __name__ == "__main__":
    main()
