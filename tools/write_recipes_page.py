"""Writes the table of examples/recipes/README.md: what each recipe trains and what memory it takes, from its options.

    python tools/write_recipes_page.py

Nothing is loaded or trained: models are built without weights from the sizes in examples/recipes/models.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from trl import SFTConfig


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from peft_esft import ESFTConfig, find_experts, select_experts  # noqa: E402
from peft_esft.cli.train_options import TrainOptions, parse  # noqa: E402
from peft_esft.cli.training_memory import memory_of_training  # noqa: E402
from peft_esft.interchange.base import empty_model  # noqa: E402
from peft_esft.scoring.memory_estimate import RESERVE  # noqa: E402
from peft_esft.scoring.model_sizes import ModelSizes  # noqa: E402


RECIPES = ROOT / "examples" / "recipes"
PAGE = RECIPES / "README.md"
START, END = "<!-- table recipes -->", "<!-- end -->"
HEADER = (
    "| recipe | frozen experts | trained | parameters | tokens in a batch | memory | of a GPU |",
    "|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Computed:
    """What is computed of a recipe.

    Attributes:
        experts: number of trained experts, of all layers together.
        trained: number of trained parameters.
        tokens: number of tokens in a batch.
        memory: bytes on the GPU.
    """

    experts: int
    trained: int
    tokens: int
    memory: float


def files() -> list[Path]:
    """The recipes for models of the Hub: those whose name ends with the memory of a GPU."""
    return sorted(RECIPES.glob("*gb.yaml"))


def model_of(recipe: Path) -> Path:
    """The file with the sizes of a recipe's model."""
    return RECIPES / "models" / f"{recipe.stem.rpartition('-')[0]}.json"


def gpu_of(recipe: Path) -> int:
    """Gigabytes of the GPU that a recipe is for."""
    return int(recipe.stem.rpartition("-")[2].removesuffix("gb"))


def options_of(recipe: Path) -> tuple[TrainOptions, SFTConfig]:
    """The options of a recipe, as `peft-esft train --config` reads them."""
    return parse(TrainOptions, ["--config", str(recipe), "--out", "FOLDER", "DATA"])


def compute(own: TrainOptions, settings: SFTConfig, model: nn.Module) -> Computed:
    """Computes a recipe.

    Args:
        own: the recipe's options of the command.
        settings: its options of TRL.
        model: without weights; it gets an adapter.
    """
    sizes = ModelSizes.of(model)
    # How many experts a budget holds does not depend on the scores.
    scores = {path: torch.rand(container.num_experts) for path, container in find_experts(model).items()}
    selection = select_experts(scores, budget=own.budget)
    config = ESFTConfig(target_experts=selection, rank=own.rank, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    tokens = settings.per_device_train_batch_size * settings.max_length
    memory = memory_of_training(own, settings, sizes, trained, tokens, element=2)
    return Computed(sum(map(len, selection.values())), trained, tokens, memory)


@cache
def computed(recipe: Path) -> Computed:
    """Computes a recipe at the real size of its model."""
    return compute(*options_of(recipe), empty_model(model_of(recipe)))


def row(recipe: Path) -> str:
    """A recipe's row of the table."""
    own, _ = options_of(recipe)
    found, sizes = computed(recipe), ModelSizes.of(empty_model(model_of(recipe)))
    form = {None: "bf16", 8: "8 bits", 4: "4 bits"}[own.bits]
    share = f"{found.experts / sizes.num_moe_layers:.1f} of {sizes.num_experts} experts"
    rank = f", rank {own.rank}" if own.rank else ""
    return (
        f"| [{recipe.stem}]({recipe.name}) | {form} | {share}{rank} | {found.trained / 1e6:,.1f} M | {found.tokens:,} "
        f"| {found.memory / 1e9:.1f} GB | {found.memory / 1e9 / gpu_of(recipe):.0%} |"
    )


def table() -> str:
    """The whole table."""
    return "\n".join([*HEADER, *map(row, files())])


def main() -> None:
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{START}.*?{END}", lambda _: f"{START}\n{table()}\n{END}", page, flags=re.DOTALL))
    for recipe in files():
        if computed(recipe).memory > RESERVE * gpu_of(recipe) * 1e9:
            print(f"{recipe.name} does not fit", file=sys.stderr)


if __name__ == "__main__":
    main()
