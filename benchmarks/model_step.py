"""Training step of a whole model, AdamW included, over ESFT's.

    python benchmarks/model_step.py [--rounds 9] [--ways ESFT full ...] [--busy]

All take turns in one process from the same weights and on the same batch. A figure above 1 says how many times as long
a way takes as ESFT: the ratio of the fastest steps and, in brackets, the median of the ratios within a round.
"""

from __future__ import annotations

import argparse

import torch

from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results
from scoring import build_model
from ways import MASTERED, NOTE, WAYS, TrainingStep


TRAINED = 8  # of 64 experts in each layer


def measure(dtype: str, checkpointing: bool, ways: list[str], rounds: int) -> dict[str, object]:
    base = build_model().to(getattr(torch, dtype))
    torch.manual_seed(0)
    tokens = torch.randint(4096, (2, 512))
    ways = [way for way in ways if way != MASTERED or dtype != "float32"]
    steps = {way: TrainingStep(way, base, TRAINED, tokens, checkpointing) for way in ways}
    times = time_in_turns(steps, rounds)
    result: dict[str, object] = {"dtype": dtype, "tokens": tokens.numel(), "checkpointing": checkpointing}
    return result | {way: times.ratio(way, "ESFT") if way in ways else "" for way in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    ways = ["ESFT", *(way for way in arguments.ways if way != "ESFT")]
    rows = [
        measure(dtype, checkpointing, ways, arguments.rounds)
        for dtype in arguments.dtypes
        for checkpointing in (False, True)
    ]
    millions = sum(parameter.numel() for parameter in build_model().parameters()) / 1e6
    write_results(
        "model_step",
        "Training step of a whole model, over ESFT's",
        f"OLMoE-like model of benchmarks/scoring.py, {millions:.0f} M parameters, {TRAINED} of 64 experts in each "
        f"layer selected, AdamW included. {NOTE}",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
