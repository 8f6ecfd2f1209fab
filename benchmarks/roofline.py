"""A layer's training step on paper: flops and bytes by formula, checked on this machine, evaluated for others.

    python benchmarks/roofline.py [--busy]

Times are flops / peak plus bytes / bandwidth: matrix products and what lies between them do not overlap. The rows of
this machine use its own measured rates (a matrix product and a copy) and stand beside a measured step; all other rows
are computed, not measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from layer_step import build_ways, route, step_of
from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results


@dataclass(frozen=True)
class Layer:
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    trained: int
    tokens: int
    share: float
    element: int  # bytes

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def expert(self) -> int:
        """Parameters of one gated expert."""
        return 3 * self.hidden * self.intermediate

    def flops(self, way: str) -> float:
        """A product forward, one for the input's gradient, one for the weights' where these are trained."""
        products = {"frozen": 2.0, "ESFT": 2 + self.share, "full": 3.0}[way]
        return products * 2 * self.pairs * self.expert

    def bytes_moved(self, way: str) -> float:
        """What is read and written besides the operands that a matrix product has in its caches.

        Per pair, in elements of H and I. transformers' grouped_mm: gather, both products, weights, back into the order
        of the tokens, sum, and their gradients: 24 H + 24 I. ESFT: gather, products, weights, sum, and the gradients
        by the two autograd functions: 12 H + 28 I. Weights: all experts twice, for a trained one its gradient; in ESFT
        also base row, delta and effective row, and the gradient once more in fp32 if it is narrower.
        """
        of_hidden, of_intermediate = (12, 28) if way == "ESFT" else (24, 24)
        per_pair = of_hidden * self.hidden + of_intermediate * self.intermediate
        weights = 2 * self.experts * self.expert * self.element
        if way == "full":
            weights += self.experts * self.expert * self.element
        if way == "ESFT":
            cast = 4 + self.element if self.element < 4 else 0
            weights += self.trained * self.expert * (3 * self.element + 4 + cast)
        return self.pairs * per_pair * self.element + weights

    def seconds(self, way: str, flops: float, bandwidth: float) -> float:
        return self.flops(way) / flops + self.bytes_moved(way) / bandwidth

    def row(self, where: str, flops: float, bandwidth: float) -> dict[str, object]:
        times = {way: self.seconds(way, flops, bandwidth) for way in ("frozen", "ESFT", "full")}
        bound = times["frozen"] + self.share * (times["full"] - times["frozen"])
        return {
            "where": where,
            "layer": f"E {self.experts}, top-{self.top_k}, H {self.hidden}, I {self.intermediate}",
            "trained": self.trained,
            "tokens": self.tokens,
            "frozen (ms)": 1e3 * times["frozen"],
            "ESFT over bound": times["ESFT"] / bound,
            "full over ESFT": times["full"] / times["ESFT"],
        }


def rates() -> tuple[float, float]:
    """This machine's flops of a product of the sizes that a group has, and its bytes per second of a copy."""
    left, right, out = torch.randn(96, 512), torch.randn(512, 512), torch.empty(96, 512)
    source, target = torch.randn(2**24), torch.empty(2**24)
    times = time_in_turns(
        {"mm": lambda: [torch.mm(left, right, out=out) for _ in range(50)], "copy": lambda: target.copy_(source)}, 15
    ).minima()
    return 50 * 2 * 96 * 512 * 512 / times["mm"], 2 * source.numel() * 4 / times["copy"]


def measured(case: tuple[int, ...], rounds: int) -> tuple[dict[str, float], float]:
    """Seconds of the three ways on this machine, and the trained experts' share of the pairs."""
    torch.manual_seed(0)
    weights, ids = route(case)
    weights.requires_grad_()
    states = torch.randn(case[-1], case[2], requires_grad=True)
    gradient = torch.randn_like(states)
    ways = build_ways(case, torch.float32, with_slow=False)
    times = time_in_turns({n: step_of(way, states, ids, weights, gradient) for n, way in ways.items()}, rounds)
    return times.minima(), float((ids < case[4]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    rows = []
    own = rates()
    for case in ((64, 6, 512, 256, 8, 1024), (64, 6, 1024, 512, 8, 1024)):
        seconds, share = measured(case, arguments.rounds)
        layer = Layer(*case, share=share, element=4)
        rows.append(layer.row("this machine, computed", *own))
        bound = seconds["frozen"] + share * (seconds["full"] - seconds["frozen"])
        rows.append(
            rows[-1]
            | {
                "where": "this machine, measured",
                "frozen (ms)": 1e3 * seconds["frozen"],
                "ESFT over bound": seconds["ESFT"] / bound,
                "full over ESFT": seconds["full"] / seconds["ESFT"],
            }
        )
    # Dense bf16 flops and bandwidth as NVIDIA gives them for the SXM card.
    h100 = (989e12, 3.35e12)
    for tokens in (1024, 8192, 32768):
        layer = Layer(64, 6, 2048, 1408, 8, tokens, share=0.2, element=2)
        rows.append(layer.row("H100, bf16, DeepSeek-V2-Lite: computed, not measured", *h100))
    write_results(
        "roofline",
        "A layer's training step on paper",
        f"This machine: {own[0] / 1e9:.0f} Gflop/s, {own[1] / 1e9:.1f} GB/s, fp32, both measured. H100: 989 Tflop/s "
        "and 3.35 TB/s, the maker's figures; 20 % of the pairs on 8 trained experts.",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
