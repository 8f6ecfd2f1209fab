"""What experts in few bits cost: time of a training step and of decoding.

    python benchmarks/quantised.py [--rounds 10] [--busy]

Time is that of one layer of experts, beside the same layer in bfloat16. What is learned over them is measured by
`quantised_quality.py`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from peft_esft import ESFTConfig, find_experts, quantize_experts

from layer_step import Layer, build_experts, route, step_of
from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results


FORMS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "nf4": {"bits": 4},
    "nf4 double": {"bits": 4, "double_quant": True},
    "int8": {"bits": 8},
}
CASES = [
    # experts, top-k, hidden, intermediate, trained, tokens: the size of DeepSeek-V2-Lite, and smaller ones
    (32, 6, 2048, 1408, 4, 512),
    (64, 6, 1024, 512, 8, 1024),
    (64, 6, 512, 256, 8, 256),
]
DECODED = (32, 6, 2048, 1408, 4, 1)


def layers(case: tuple[int, ...]) -> dict[str, nn.Module]:
    """The layer in each form, with an adapter."""
    experts, top_k, hidden, intermediate, number, _ = case
    plain = Layer(build_experts(experts, top_k, hidden, intermediate, "grouped_mm").to(torch.bfloat16))
    made: dict[str, nn.Module] = {}
    for name, settings in FORMS.items():
        layer = copy.deepcopy(plain)
        if settings is not None:
            quantize_experts(layer, **settings)
        made[name] = get_peft_model(layer, ESFTConfig(target_experts={"experts": list(range(number))}))
    return made


def nbytes(layer: nn.Module) -> int:
    (container,) = find_experts(layer).values()
    return sum(parameter.nbytes for parameter in container.parameters())


def decoding(layer: nn.Module, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        layer(states, ids, weights)

    return call


def speed(rounds: int) -> list[dict[str, object]]:
    rows = []
    for case in [*CASES, DECODED]:
        torch.manual_seed(0)
        experts, _, hidden, intermediate, number, tokens = case
        weights, ids = route(case)
        states = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        weights = weights.to(torch.bfloat16).requires_grad_()
        gradient = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        made = layers(case)
        if case == DECODED:
            calls = {name: decoding(layer, states, ids, weights) for name, layer in made.items()}
        else:
            calls = {name: step_of(layer, states, ids, weights, gradient) for name, layer in made.items()}
        times = time_in_turns(calls, rounds)
        fastest, median = times.minima(), times.medians()
        for name, layer in made.items():
            rows.append(
                {
                    "what": "decoding a token" if case == DECODED else "training step",
                    "E": experts,
                    "H / I": f"{hidden} / {intermediate}",
                    "trained": number,
                    "tokens": tokens,
                    "form": name,
                    "bytes over bf16": nbytes(layer) / nbytes(made["bf16"]),
                    "ms": 1000 * fastest[name],
                    "over bf16": f"{fastest[name] / fastest['bf16']:.2f} ({median[name] / median['bf16']:.2f})",
                }
            )
        print(*rows[-len(made) :], sep="\n", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    write_results(
        "quantised_speed",
        "Experts in few bits: time of a layer",
        f"Minima of {arguments.rounds} interleaved calls over those of the layer in bf16, medians in brackets.",
        speed(arguments.rounds),
        versions(),
    )


if __name__ == "__main__":
    main()
