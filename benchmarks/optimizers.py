"""What an adapter learns with the optimizers of bitsandbytes beside torch's AdamW, and the bytes of their state.

    python benchmarks/optimizers.py [--tasks TASK ...] [--seeds 3] [--steps 60] [--rate 1e-3]

The embedded model in fp32, the same experts and batches for all. Rows of a seed are to be compared.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import get_peft_model


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_moe"))

from peft_esft import ESFTConfig, score_experts

from reporting import versions, write_results
from tasks import batches, endless_batches, evaluate, general_loss, load_base, load_task


OPTIMIZERS: dict[str, Any] = {"adamw_torch": torch.optim.AdamW, "adamw_8bit": bitsandbytes.optim.AdamW8bit}
"""By their names in `TrainingArguments`."""


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of moments and their scales. A table of 256 values, which all share, is left out."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and not name.startswith("qmap")
    )


def run(task: str, seed: int, name: str, steps: int, rate: float, target_experts: Any) -> dict[str, Any]:
    """Trains once and measures on held-out examples."""
    base, tokenizer = load_base()
    training, held_out = load_task(task, "train"), load_task(task, "eval")
    torch.manual_seed(seed)
    model = get_peft_model(base, ESFTConfig(target_experts=target_experts, task_type="CAUSAL_LM")).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[name](trained, lr=rate, weight_decay=0.0)
    for batch in islice(endless_batches(training, tokenizer, seed=seed), steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found, after = evaluate(model.eval(), tokenizer, held_out), general_loss(model, tokenizer)
    return {
        "task": task,
        "optim": name,
        "seed": seed,
        "exact (%)": f"{100 * found['exact']:.1f}",
        "loss": float(found["loss"]),
        "other text": sum(after.values()) / len(after),
        "state, bytes a weight": state_bytes(optimizer) / sum(parameter.numel() for parameter in trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["verses"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    rows = []
    for task in arguments.tasks:
        base, tokenizer = load_base()
        scores = score_experts(base, batches(load_task(task, "train"), tokenizer), max_tokens=32_768, progress=False)
        target_experts = ESFTConfig.from_scores(scores, top_p=0.2).target_experts
        for seed in range(arguments.seeds):
            for name in OPTIMIZERS:
                rows.append(run(task, seed, name, arguments.steps, arguments.rate, target_experts))
                print(rows[-1], flush=True)
    write_results(
        "optimizers",
        "Optimizers: what an adapter learns",
        f"Embedded model in fp32, {arguments.steps} steps at {arguments.rate:g} over the same experts (top_p 0.2) and "
        "batches. Loss and exact answers on held-out examples of the task, loss on other text.",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
