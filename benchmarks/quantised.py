"""What experts in few bits cost: time of a training step and of decoding, and what an adapter learns over them.

    python benchmarks/quantised.py speed [--rounds 10] [--busy]
    python benchmarks/quantised.py quality [--tasks TASK ...] [--seeds 3] [--steps 100]

Speed is that of one layer of experts, beside the same layer in bfloat16. For quality an adapter is trained on the
embedded model over each form of the base, with the same experts and batches; "kept" leaves the trained experts in
full precision.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_moe"))

from peft_esft import ESFTConfig, find_experts, quantize_experts, score_experts

from layer_step import Layer, build_experts, route, step_of
from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results
from tasks import TASKS, batches, endless_batches, evaluate, general_loss, load_base, load_task


FORMS = {"bf16": None, "nf4": 4, "int8": 8}
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
    for name, bits in FORMS.items():
        layer = copy.deepcopy(plain)
        if bits is not None:
            quantize_experts(layer, bits=bits)
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


def base_in(form: str, target_experts: dict[str, list[int]]) -> nn.Module:
    """The embedded model in a form: "plain", "int8", "nf4" or "nf4, kept"."""
    model, _ = load_base()
    if form == "plain":
        return model
    return quantize_experts(model, bits=8 if form == "int8" else 4, keep=target_experts if "kept" in form else None)


def quality(tasks: list[str], seeds: int, steps: int) -> list[dict[str, object]]:
    rows = []
    for task in tasks:
        base, tokenizer = load_base()
        training, held_out = load_task(task, "train"), load_task(task, "eval")
        scores = score_experts(base, batches(training, tokenizer), max_tokens=32_768, progress=False)
        target_experts = ESFTConfig.from_scores(scores, metric="token", top_p=0.2).target_experts
        for form in ("plain", "int8", "nf4", "nf4, kept"):
            before = general_loss(base_in(form, target_experts), tokenizer)
            for seed in range(seeds):
                torch.manual_seed(seed)
                config = ESFTConfig(target_experts=target_experts, task_type="CAUSAL_LM")
                model = get_peft_model(base_in(form, target_experts), config).train()
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
                for batch in islice(endless_batches(training, tokenizer, seed=seed), steps):
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                found, after = evaluate(model.eval(), tokenizer, held_out), general_loss(model, tokenizer)
                rows.append(
                    {
                        "task": task,
                        "base": form,
                        "seed": seed,
                        "exact (%)": f"{100 * found['exact']:.1f}",
                        "loss": float(found["loss"]),
                        "other text, base": sum(before.values()) / len(before),
                        "other text, trained": sum(after.values()) / len(after),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "quality"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    if arguments.part == "speed":
        write_results(
            "quantised_speed",
            "Experts in few bits: time of a layer",
            f"Minima of {arguments.rounds} interleaved calls over those of the layer in bf16, medians in brackets.",
            speed(arguments.rounds),
            versions(),
        )
        return
    write_results(
        "quantised_quality",
        "Experts in few bits: what an adapter learns over them",
        f"Embedded model in fp32, {arguments.steps} steps of AdamW over the same experts (top_p 0.2, chosen on the "
        "plain base). kept: the trained experts in full precision. Loss and exact answers on held-out examples of the "
        "task.",
        quality(arguments.tasks, arguments.seeds, arguments.steps),
        versions(),
    )


if __name__ == "__main__":
    main()
