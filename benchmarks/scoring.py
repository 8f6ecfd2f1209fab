"""Time of scoring over a plain forward pass.

    python benchmarks/scoring.py

The two take turns in one process. Reported are the median of the ratios of neighbouring passes, the ratio of the
fastest ones, the bytes that the accumulators hold, and how much more is allocated at once than in a plain pass.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from peft_esft import find_experts, score_experts
from peft_esft.scoring.measure import RoutingAccumulator

from reporting import peak_of, versions, write_results


LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 64, 6, 512, 256
BATCHES = [(1, 256), (4, 256), (8, 512)]
ROUNDS = 41


def build_model(**changes: Any) -> OlmoeForCausalLM:
    """The benchmarks' model, from the same random weights each time; `changes` are to the fields of its config."""
    torch.manual_seed(0)
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "vocab_size": 4096,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return OlmoeForCausalLM(OlmoeConfig(**fields | changes)).eval()


@torch.inference_mode()
def measure(model: OlmoeForCausalLM, rows: int, length: int) -> dict[str, float]:
    """Interleaved rounds of one plain and one scored pass over the same batch."""
    inputs = {"input_ids": torch.randint(4096, (rows, length))}

    def scored() -> None:
        score_experts(model, [inputs], progress=False)

    seconds: dict[str, list[float]] = {"plain": [], "scored": []}
    for _ in range(3):
        model(**inputs)
    for number in range(ROUNDS):
        for kind in ("plain", "scored") if number % 2 else ("scored", "plain"):
            started = time.perf_counter()
            if kind == "plain":
                model(**inputs)
            else:
                scored()
            seconds[kind].append(time.perf_counter() - started)
    accumulators = [RoutingAccumulator(c.num_experts, c.parameters_per_expert) for c in find_experts(model).values()]
    held = sum(value.nbytes for own in accumulators for value in vars(own).values() if isinstance(value, torch.Tensor))
    return {
        "tokens": rows * length,
        "median of ratios": statistics.median(s / p for s, p in zip(seconds["scored"], seconds["plain"], strict=True)),
        "ratio of minima": min(seconds["scored"]) / min(seconds["plain"]),
        "accumulators (bytes)": held,
        "peak above the plain pass (bytes)": peak_of(scored) - peak_of(lambda: model(**inputs)),
    }


def main() -> None:
    model = build_model()
    rows = [measure(model, *batch) for batch in BATCHES]
    write_results(
        "scoring",
        "Scoring over a plain forward pass",
        f"OLMoE-like, fp32: {LAYERS} layers, {EXPERTS} experts, top-{TOP_K}, hidden {HIDDEN}, "
        f"expert width {INTERMEDIATE}; {ROUNDS} interleaved rounds.",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
