"""Memory of training: what is held between steps, and the peak above it in a step.

    python benchmarks/memory.py [--ways ESFT full ...]

Held bytes are counted on the tensors, the peak on every allocation of the second step (torch's profiler). The base is
the frozen model, differentiated with respect to its embedded input. The bound is 1.02 of the base plus the selected
experts' share of what full fine-tuning adds to it, with fp32 masters if the base is of half precision.
"""

from __future__ import annotations

import argparse

import torch

from peft_esft import find_experts

from reporting import peak_of, versions, write_results
from scoring import build_model
from ways import MASTERED, NOTE, WAYS, TrainingStep, selection_of


TRAINED = 8  # of 64 experts in each layer


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_base(dtype: torch.dtype, tokens: torch.Tensor, checkpointing: bool) -> dict[str, int]:
    model = build_model().to(dtype).train().requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()

    def step() -> None:
        model(inputs_embeds=inputs, labels=tokens, use_cache=False).loss.backward()

    return {"parameters": bytes_of(list(model.parameters())), "gradients": 0, "optimizer": 0, "peak": peak_of(step)}


def measure_way(way: str, dtype: torch.dtype, tokens: torch.Tensor, checkpointing: bool) -> dict[str, int]:
    step = TrainingStep(way, build_model().to(dtype), TRAINED, tokens, checkpointing)
    step()
    states = [value for state in step.optimizer.state.values() for value in state.values() if value.dim()]
    trained = step.masters or step.parameters
    gradients = bytes_of([parameter.grad for parameter in trained if parameter.grad is not None])
    # Gradients are made anew in each step: they are part of its peak.
    step.optimizer.zero_grad()
    return {
        "parameters": bytes_of([*step.model.parameters(), *step.masters]),
        "gradients": gradients,
        "optimizer": bytes_of(states),
        "peak": peak_of(step),
    }


def selected_share() -> float:
    """Parameters of the selected experts over all parameters."""
    model = build_model()
    containers = find_experts(model)
    selected = sum(len(ids) * containers[p].parameters_per_expert for p, ids in selection_of(model, TRAINED).items())
    return selected / sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokens = torch.randint(4096, (2, 512))
    share = selected_share()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for checkpointing in (False, True):
            base = measure_base(dtype, tokens, checkpointing)
            ways = [way for way in arguments.ways if way != MASTERED or dtype != torch.float32]
            found: dict[str, dict[str, int]] = {way: measure_way(way, dtype, tokens, checkpointing) for way in ways}
            total = {way: own["parameters"] + own["optimizer"] + own["peak"] for way, own in found.items()}
            least = base["parameters"] + base["peak"]
            peer = total.get(MASTERED, total.get("full", float("nan")))
            bound = 1.02 + share * (peer / least - 1)
            rows += [
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "checkpointing": checkpointing,
                    "way": way,
                    **{f"{key} (MB)": value / 1e6 for key, value in (base if way == "base" else found[way]).items()},
                    "over the base": (least if way == "base" else total[way]) / least,
                    "bound": bound,
                }
                for way in ("base", *found)
            ]
    write_results(
        "memory",
        "Memory of training",
        f"OLMoE-like model of benchmarks/scoring.py, 1,024 tokens, {TRAINED} of 64 experts in each layer selected "
        f"({100 * share:.1f} % of all parameters). peak: the most that a step allocates, gradients included. over the "
        f"base: parameters + optimizer + peak. {NOTE}",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
