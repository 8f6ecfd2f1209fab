"""Writes the tables of docs/scaling.md: what fits on one GPU, and what several GPUs hold and send.

    python tools/write_scaling_page.py

Nothing is loaded: models are built without weights from the sizes in examples/recipes/models.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peft_esft.interchange.base import empty_model  # noqa: E402
from peft_esft.scoring.memory_estimate import (  # noqa: E402
    BaseFormat,
    Engine,
    Setup,
    estimate,
    most_experts,
    plan,
    recommended,
)
from peft_esft.scoring.model_sizes import ModelSizes  # noqa: E402

from reporting import fill_tables  # noqa: E402


PAGE = ROOT / "docs" / "scaling.md"
MODELS = ROOT / "examples" / "recipes" / "models"
NAMES = {
    "OLMoE-1B-7B": "olmoe-1b-7b",
    "DeepSeek-V2-Lite": "deepseek-v2-lite",
    "gpt-oss-20b": "gpt-oss-20b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "gpt-oss-120b": "gpt-oss-120b",
    "DeepSeek-V3": "deepseek-v3",
}
ON_ONE, ON_SEVERAL = list(NAMES)[:-1], ("DeepSeek-V2-Lite", "Qwen3-30B-A3B", "gpt-oss-120b", "DeepSeek-V3")
CARDS = (24, 48, 80)
TOKENS = 2048
ALONE = Setup(tokens=TOKENS, optim="adamw_torch_fused")
WAYS = {
    "ESFT, AdamW": ALONE,
    "ESFT, 8-bit AdamW": replace(ALONE, optim="adamw_8bit"),
    "ESFT of rank 16": replace(ALONE, rank=16),
}
BASES: tuple[BaseFormat, ...] = ("bf16", "int8", "nf4")
SEVERAL = (8, 64)


@cache
def sizes_of(name: str) -> ModelSizes:
    """The sizes of a model of `NAMES`."""
    return ModelSizes.of(empty_model(MODELS / f"{NAMES[name]}.json"))


def fitting_table() -> str:
    """How many experts of each layer fit on one GPU, by model, way to train, base and memory."""
    rows = ["| model (experts a layer) | way | " + " | ".join(f"{card} GB" for card in CARDS) + " |"]
    rows.append("|---" * (2 + len(CARDS)) + "|")
    for name in ON_ONE:
        sizes = sizes_of(name)
        title = f"{name} ({sizes.num_experts})"
        for way, setup in WAYS.items():
            cells = [_experts(sizes, replace(setup, memory=card * 1e9)) for card in CARDS]
            rows.append(f"| {title} | {way} | {' | '.join(cells)} |")
        setups = [replace(ALONE, memory=card * 1e9) for card in CARDS]
        for way, method in (("LoRA on attention, bf16", "LoRA attention"), ("full, bf16", "full")):
            cells = ["yes" if estimate(sizes, own, method).fits else "no" for own in setups]  # type: ignore[arg-type]
            rows.append(f"| {title} | {way} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _experts(sizes: ModelSizes, setup: Setup) -> str:
    counts = [most_experts(sizes, replace(setup, base=base)) for base in BASES]
    return " / ".join(str(count) if count else "-" for count in counts)


def engines_table() -> str:
    """What each of several GPUs of 80 GB holds and sends with a tenth of the experts."""
    engines: tuple[Engine, ...] = ("FSDP2", "EP")
    rows = [
        "| model, GPUs | ESFT | LoRA | full, fp32 | ESFT sends (GB a step) | recommended for ESFT |",
        "|---" * 6 + "|",
    ]
    for name in ON_SEVERAL:
        for gpus in SEVERAL:
            sizes, setup = sizes_of(name), replace(ALONE, gpus=gpus, tokens=4096)
            full = replace(setup, base="fp32")
            own = [estimate(sizes, setup, "ESFT", engine) for engine in engines]
            lora = [estimate(sizes, setup, "LoRA", engine) for engine in engines]
            whole = [estimate(sizes, full, "full", engine) for engine in engines]
            held = [" / ".join(f"{one.total / 1e9:,.0f}" for one in ways) for ways in (own, lora, whole)]
            sent = " / ".join(f"{one.sent / 1e9:,.0f}" for one in own)
            best = recommended(plan(sizes, setup))
            choice = "does not fit" if best is None else f"{best.engine}, {best.setup.base}"
            rows.append(f"| {name}, {gpus} x 80 GB | {' | '.join([*held, sent, choice])} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with its tables."""
    return fill_tables(page, {"fitting": fitting_table(), "engines": engines_table()})


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
