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


def train(model: nn.Module, tokenizer, examples: list[tuple[str, str]], name: str) -> None:
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


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's weights by their original names, whatever is wrapped around them."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if ".esft_" not in name
    }


def frequency_of_commonest(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> float:
    """Share of the held-out answers that are the training answers' commonest one."""
    commonest, _ = Counter(answer for _, answer in train).most_common(1)[0]
    return sum(answer == commonest for _, answer in held_out) / len(held_out)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print()


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    base, tokenizer = load_base()
    pristine = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    training = {task: load_task(task, "train") for task in DEMO_TASKS}
    held_out = {task: load_task(task, "eval") for task in DEMO_TASKS}
    checks: dict[str, bool] = {}

    print(f"\nBase: {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M parameters, {type(base).__name__}")
    for task in DEMO_TASKS:
        print(f"Task {task}: {EXPLANATIONS[task]}; {len(training[task])} examples to train on")
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
        trained = base_weights(model)
        checks[f"training {task} left the base bit-identical"] = all(
            torch.equal(trained[name], weight) for name, weight in pristine.items()
        )

    print("\n3. Both adapters on one frozen base\n")
    model = PeftModel.from_pretrained(base, OUTPUT / DEMO_TASKS[0], adapter_name=DEMO_TASKS[0])
    model.load_adapter(OUTPUT / DEMO_TASKS[1], adapter_name=DEMO_TASKS[1])
    # What a model would score that has learnt nothing but the most frequent answer.
    guesses = {task: frequency_of_commonest(training[task], held_out[task]) for task in DEMO_TASKS}
    results: dict[str, dict[str, float]] = {"base": {}}
    general: dict[str, float] = {}
    with model.disable_adapter():
        for task in DEMO_TASKS:
            results["base"][task] = evaluate(model, tokenizer, held_out[task])["exact"]
        general["base"] = sum(general_loss(model, tokenizer).values()) / 6
    for adapter in DEMO_TASKS:
        model.set_adapter(adapter)
        results[adapter] = {task: evaluate(model, tokenizer, held_out[task])["exact"] for task in DEMO_TASKS}
        general[adapter] = sum(general_loss(model, tokenizer).values()) / 6
    model.base_model.set_adapter(list(DEMO_TASKS))
    results["both"] = {task: evaluate(model, tokenizer, held_out[task])["exact"] for task in DEMO_TASKS}
    general["both"] = sum(general_loss(model, tokenizer).values()) / 6
    for task, other in (DEMO_TASKS, DEMO_TASKS[::-1]):
        own = results[task][task]
        checks[f"the {task} adapter lifts its task above the base, the other adapter and guessing"] = (
            own >= max(results["base"][task], results[other][task], guesses[task]) + 0.1
        )

    print("4. Merge one\n")
    chosen = DEMO_TASKS[0]
    model.set_adapter(chosen)
    before = {name: parameter.detach().clone() for name, parameter in base_weights(model).items()}
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    checks["unmerging restored the base bit for bit"] = all(
        torch.equal(before[name], weight) and torch.equal(pristine[name], weight)
        for name, weight in base_weights(model).items()
    )
    merged = model.merge_and_unload()
    merged_result = evaluate(merged, tokenizer, held_out[chosen])["exact"]
    checks["merging gave equal results"] = merged_result == results[chosen][chosen]
    merged.save_pretrained(OUTPUT / "merged")

    header = ["answers that are exactly right (%)", *DEMO_TASKS, "loss on general text", "file"]
    names = {"base": "base", **{task: f"adapter {task}" for task in DEMO_TASKS}, "both": "both at once"}
    rows = [["the commonest answer", *(f"{100 * guesses[task]:.1f}" for task in DEMO_TASKS), "", ""]]
    for key, name in names.items():
        file = f"{sizes[key] / 1e6:.2f} MB" if key in sizes else "-"
        rows.append([name, *(f"{100 * results[key][task]:.1f}" for task in DEMO_TASKS), f"{general[key]:.3f}", file])
    merged_size = (OUTPUT / "merged" / "model.safetensors").stat().st_size
    rows.append([f"merged {chosen}", f"{100 * merged_result:.1f}", "", "", f"{merged_size / 1e6:.2f} MB"])
    print_table(header, rows)
    for check, holds in checks.items():
        print(f"  {'ok    ' if holds else 'FAILED'}  {check}")
    print(f"\n{time.monotonic() - started:.0f} seconds; the adapters are in {OUTPUT}/")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
