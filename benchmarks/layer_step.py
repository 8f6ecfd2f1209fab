"""Training step of one experts layer, over its bound and beside other ways to train it.

    python benchmarks/layer_step.py [--spread] [--dtypes float32 bfloat16] [--rounds 15] [--busy]

A step is forward and backward, the gradients of the input and of the routing weights included, and starts from changed
weights as after an optimizer step. The bound, measured in the same run: the frozen layer, plus the trained experts'
share of the (token, expert) pairs of what the weight gradient costs full fine-tuning. All take turns in one process;
reported are the ratio of the fastest steps and, in brackets, the ratio of the medians.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from peft_esft import ESFTConfig

from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results


QUICK = [
    # experts, top-k, hidden, intermediate, trained, tokens
    (8, 2, 512, 1024, 1, 1024),
    (64, 6, 512, 256, 8, 256),
    (64, 6, 512, 256, 8, 1024),
    (64, 6, 512, 256, 8, 4096),
    (128, 8, 512, 256, 16, 1024),
]
SPREAD = [
    # Every number of experts, size, share of trained experts (6 to 25 %) and number of tokens with several others.
    (8, 2, 512, 256, 2, 8192),
    (8, 2, 1024, 512, 1, 256),
    (8, 2, 1024, 512, 2, 4096),
    (8, 2, 2048, 1024, 1, 1024),
    (64, 6, 512, 256, 4, 8192),
    (64, 6, 1024, 512, 4, 1024),
    (64, 6, 1024, 512, 16, 4096),
    (64, 6, 2048, 1024, 8, 1024),
    (128, 8, 512, 256, 32, 8192),
    (128, 8, 1024, 512, 8, 256),
    (128, 8, 1024, 512, 8, 1024),
    (128, 8, 1024, 512, 16, 4096),
]


class Layer(nn.Module):
    """A module around the experts: what PEFT can replace a child of."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


class ModuleExperts(nn.Module):
    """One module for each expert and a loop over those that were chosen, as in the models that ESFT was made for."""

    def __init__(self, experts: OlmoeExperts, trained: list[int]) -> None:
        super().__init__()
        self.gate_up = nn.ParameterList(nn.Parameter(w.clone(), False) for w in experts.gate_up_proj.detach())
        self.down = nn.ParameterList(nn.Parameter(w.clone(), False) for w in experts.down_proj.detach())
        for expert in trained:
            self.gate_up[expert].requires_grad_()
            self.down[expert].requires_grad_()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.down[expert]) * top_k_weights[token, place, None]
            output = output.index_add(0, token, rows.to(output.dtype))
        return output


def build_experts(experts: int, top_k: int, hidden: int, intermediate: int, implementation: str) -> OlmoeExperts:
    config = OlmoeConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    module = OlmoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def masked(module: OlmoeExperts, trained: list[int]) -> OlmoeExperts:
    """Full gradients whose unselected rows are set to zero: the obvious way to train some rows of a fused tensor."""
    for parameter in module.parameters():
        mask = torch.zeros(parameter.shape[0], 1, 1, dtype=parameter.dtype)
        mask[trained] = 1
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    return module


def build_ways(case: tuple[int, ...], dtype: torch.dtype, with_slow: bool) -> dict[str, nn.Module]:
    experts, top_k, hidden, intermediate, number, _ = case
    trained = list(range(number))
    frozen = build_experts(experts, top_k, hidden, intermediate, "grouped_mm").to(dtype).requires_grad_(False)

    def fused(implementation: str = "grouped_mm") -> OlmoeExperts:
        module = build_experts(experts, top_k, hidden, intermediate, implementation)
        module.load_state_dict(frozen.state_dict())
        return module.to(dtype)

    esft = get_peft_model(Layer(copy.deepcopy(frozen)), ESFTConfig(target_experts={"experts": trained}))
    ways: dict[str, nn.Module] = {"frozen": Layer(frozen), "ESFT": esft, "full": Layer(fused())}
    if with_slow:
        ways["full, eager"] = Layer(fused("eager"))
        ways["mask"] = Layer(masked(fused(), trained))
        lora = LoraConfig(r=16, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        ways["LoRA r 16"] = get_peft_model(Layer(fused()), lora)
        ways["modules"] = Layer(ModuleExperts(frozen, trained))
    return ways


def route(case: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Routing weights and expert ids, the trained experts chosen somewhat more often than others."""
    experts, top_k, _, _, number, tokens = case
    logits = torch.randn(tokens, experts)
    logits[:, :number] += 0.3
    weights, ids = logits.softmax(-1).topk(top_k)
    return weights, ids


def step_of(way: nn.Module, states: Tensor, ids: Tensor, weights: Tensor, gradient: Tensor) -> Callable[[], None]:
    trainable = [parameter for parameter in way.parameters() if parameter.requires_grad]

    def step() -> None:
        states.grad = weights.grad = None
        for parameter in trainable:
            parameter.grad = None
            torch._C._increment_version([parameter])  # nothing may be reused from the step before
        way(states, ids, weights).backward(gradient)

    return step


def measure(case: tuple[int, ...], dtype: torch.dtype, rounds: int, with_slow: bool) -> dict[str, object]:
    torch.manual_seed(0)
    experts, top_k, hidden, intermediate, number, tokens = case
    weights, ids = route(case)
    share = float((ids < number).float().mean())
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weights = weights.to(dtype).requires_grad_()
    gradient = torch.randn(tokens, hidden, dtype=dtype)
    ways = build_ways(case, dtype, with_slow)
    times = time_in_turns({n: step_of(way, states, ids, weights, gradient) for n, way in ways.items()}, rounds)
    fastest, median = times.minima(), times.medians()
    result: dict[str, object] = {
        "dtype": str(dtype).removeprefix("torch."),
        "E / top-k": f"{experts} / {top_k}",
        "H / I": f"{hidden} / {intermediate}",
        "trained": number,
        "pairs (%)": f"{100 * share:.0f}",
        "tokens": tokens,
    }
    bounds = [t["frozen"] + share * (t["full"] - t["frozen"]) for t in (fastest, median)]
    for way in ways:
        result[way] = f"{fastest[way] / bounds[0]:.2f} ({median[way] / bounds[1]:.2f})"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spread", action="store_true", help="more shapes, without the slow peers")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    rows = []
    for dtype in arguments.dtypes:
        for case in SPREAD if arguments.spread else QUICK:
            rows.append(measure(case, getattr(torch, dtype), arguments.rounds, with_slow=not arguments.spread))
            print(rows[-1], flush=True)
    write_results(
        "layer_step_spread" if arguments.spread else "layer_step",
        "Training step of one layer, over its bound",
        "Bound = frozen layer (forward and input gradient) + trained experts' share of the pairs x what the weight "
        f"gradient adds to full fine-tuning. Minima of {arguments.rounds} interleaved steps, medians in brackets. "
        "frozen, full: transformers' grouped_mm. mask: full gradients with unselected rows set to zero. LoRA: PEFT's, "
        "through target_parameters, in grouped_mm. modules: one module for each expert, the trained ones in place.",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
