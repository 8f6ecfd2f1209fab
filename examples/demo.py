"""The main job on the embedded model: two tasks, two adapters, one frozen base.

Scores two tasks, trains an adapter of the chosen experts for each, and shows what the method promises: each adapter
lifts its own task, the base's weights are untouched bit for bit, merging gives the same results, and the files are
small. Exits with 0 only if all of that holds.
"""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parent / "tiny_moe"))

from peft_esft import ESFTConfig, score_experts

from tasks import batches, endless_batches, evaluate, general_loss, load_base, load_task


DEMO_TASKS = ("sections", "verses")
EXPLANATIONS = {
    "sections": "a paragraph of a Russian manual page to its heading, of 7",
    "verses": "a verse of the King James Bible to its book, of 8",
}
STEPS = 200
LEARNING_RATE = 1e-3
OUTPUT = Path("demo_output")

Examples = list[tuple[str, str]]
Weights = dict[str, Tensor]
Checks = dict[str, bool]
"""What the method promises, and whether it held."""


@dataclass(frozen=True)
class Result:
    """What a model gets right.

    Attributes:
        exact: share of each task's held-out answers that are exactly right.
        general_loss: mean over the domains of general text.
    """

    exact: dict[str, float]
    general_loss: float


def train(model: nn.Module, tokenizer, examples: Examples, name: str) -> None:
    """A plain training loop; `transformers.Trainer` works the same."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()
    bar = tqdm(islice(endless_batches(examples, tokenizer), STEPS), f"Training {name}", STEPS, unit=" steps")
    for batch in bar:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def base_weights(model: nn.Module) -> Weights:
    """The base's weights by their original names, whatever is wrapped around them."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if ".esft_" not in name
    }


def are_equal(first: Weights, second: Weights) -> bool:
    """True if all weights are the same bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def measure(model: nn.Module, tokenizer, held_out: dict[str, Examples]) -> Result:
    exact = {task: evaluate(model, tokenizer, held_out[task])["exact"] for task in DEMO_TASKS}
    losses = general_loss(model, tokenizer).values()
    return Result(exact, sum(losses) / len(losses))


def frequency_of_commonest(train: Examples, held_out: Examples) -> float:
    """Share of the held-out answers that are the training answers' commonest one."""
    commonest, _ = Counter(answer for _, answer in train).most_common(1)[0]
    return sum(answer == commonest for _, answer in held_out) / len(held_out)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print()


def choose_experts(base: nn.Module, tokenizer, training: dict[str, Examples]) -> dict[str, ESFTConfig]:
    """Scores each task by forward passes and takes the experts that its tokens choose most."""
    print("\n1. Which experts does each task use?\n")
    configs = {}
    for task in DEMO_TASKS:
        scores = score_experts(base, batches(training[task], tokenizer), max_tokens=32_768)
        configs[task] = ESFTConfig.from_scores(scores, metric="token", top_p=0.2, task_type="CAUSAL_LM")
    first, second = (configs[task].target_experts for task in DEMO_TASKS)
    rows = [
        [path, str(len(first[path])), str(len(second[path])), str(len(set(first[path]) & set(second[path])))]
        for path in first
    ]
    print()
    print_table(["experts of 64 that take 20 % of the choices", *DEMO_TASKS, "shared"], rows)
    return configs


def train_adapters(
    base: nn.Module,
    tokenizer,
    training: dict[str, Examples],
    configs: dict[str, ESFTConfig],
    pristine: Weights,
    checks: Checks,
) -> dict[str, int]:
    """Trains and saves an adapter for each task; returns the bytes of the files."""
    print("2. Train only these experts, save only these\n")
    sizes = {}
    for task in DEMO_TASKS:
        model = get_peft_model(copy.deepcopy(base), configs[task])
        model.print_trainable_parameters()
        train(model, tokenizer, training[task], task)
        model.save_pretrained(OUTPUT / task)
        rows = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        sizes[task] = (OUTPUT / task / "adapter_model.safetensors").stat().st_size
        checks[f"the {task} file is at most 1 % larger than the trained rows"] = sizes[task] <= 1.01 * rows
        checks[f"training {task} left the base bit-identical"] = are_equal(base_weights(model), pristine)
    return sizes


def compare_on_one_base(
    model: PeftModel, tokenizer, held_out: dict[str, Examples], guesses: dict[str, float], checks: Checks
) -> dict[str, Result]:
    """What the base, each adapter and both at once get right, all with one set of base weights in memory."""
    print("\n3. Both adapters on one frozen base\n")
    results = {}
    with model.disable_adapter():
        results["base"] = measure(model, tokenizer, held_out)
    for adapter in DEMO_TASKS:
        model.set_adapter(adapter)
        results[adapter] = measure(model, tokenizer, held_out)
    model.base_model.set_adapter(list(DEMO_TASKS))
    results["both"] = measure(model, tokenizer, held_out)
    for task, other in (DEMO_TASKS, DEMO_TASKS[::-1]):
        others = max(results["base"].exact[task], results[other].exact[task], guesses[task])
        checks[f"the {task} adapter lifts its task above the base, the other adapter and guessing"] = (
            results[task].exact[task] >= others + 0.1
        )
    return results


def merge_one(
    model: PeftModel,
    tokenizer,
    held_out: dict[str, Examples],
    results: dict[str, Result],
    pristine: Weights,
    checks: Checks,
) -> float:
    """Merges the first adapter into the base and saves that as an ordinary model; returns what it gets right."""
    print("4. Merge one\n")
    chosen = DEMO_TASKS[0]
    model.set_adapter(chosen)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    checks["unmerging restored the base bit for bit"] = are_equal(base_weights(model), pristine)
    merged = model.merge_and_unload()
    exact = evaluate(merged, tokenizer, held_out[chosen])["exact"]
    checks["merging gave equal results"] = exact == results[chosen].exact[chosen]
    merged.save_pretrained(OUTPUT / "merged")
    return exact


def print_results(
    results: dict[str, Result], guesses: dict[str, float], merged_exact: float, sizes: dict[str, int]
) -> None:
    header = ["answers that are exactly right (%)", *DEMO_TASKS, "loss on general text", "file"]
    names = {"base": "base", **{task: f"adapter {task}" for task in DEMO_TASKS}, "both": "both at once"}
    rows = [["the commonest answer", *(f"{100 * guesses[task]:.1f}" for task in DEMO_TASKS), "", ""]]
    for key, name in names.items():
        file = f"{sizes[key] / 1e6:.2f} MB" if key in sizes else "-"
        result = results[key]
        exact = [f"{100 * result.exact[task]:.1f}" for task in DEMO_TASKS]
        rows.append([name, *exact, f"{result.general_loss:.3f}", file])
    merged_size = (OUTPUT / "merged" / "model.safetensors").stat().st_size
    rows.append([f"merged {DEMO_TASKS[0]}", f"{100 * merged_exact:.1f}", "", "", f"{merged_size / 1e6:.2f} MB"])
    print_table(header, rows)


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    base, tokenizer = load_base()
    pristine = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    training = {task: load_task(task, "train") for task in DEMO_TASKS}
    held_out = {task: load_task(task, "eval") for task in DEMO_TASKS}
    guesses = {task: frequency_of_commonest(training[task], held_out[task]) for task in DEMO_TASKS}
    checks: Checks = {}
    print(f"\nBase: {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M parameters, {type(base).__name__}")
    for task in DEMO_TASKS:
        print(f"Task {task}: {EXPLANATIONS[task]}; {len(training[task])} examples to train on")

    configs = choose_experts(base, tokenizer, training)
    sizes = train_adapters(base, tokenizer, training, configs, pristine, checks)
    model = PeftModel.from_pretrained(base, OUTPUT / DEMO_TASKS[0], adapter_name=DEMO_TASKS[0])
    model.load_adapter(OUTPUT / DEMO_TASKS[1], adapter_name=DEMO_TASKS[1])
    results = compare_on_one_base(model, tokenizer, held_out, guesses, checks)
    merged_exact = merge_one(model, tokenizer, held_out, results, pristine, checks)

    print_results(results, guesses, merged_exact, sizes)
    for check, holds in checks.items():
        print(f"  {'ok    ' if holds else 'FAILED'}  {check}")
    print(f"\n{time.monotonic() - started:.0f} seconds; the adapters are in {OUTPUT}/")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
