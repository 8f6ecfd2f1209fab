"""Lists the trials of the comparison, the most important ones first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cells import ANSWERS, BASES, CELLS, FRESH, PLAIN, SEEN, Cell


SAME_LR = 3e-3
OTHER_LRS = (1e-3, 1e-2)
SEEDS = (0, 1, 2)
SMALL, USUAL, LARGE = 0.1, 0.2, 0.4  # p of the token share; it sets how many experts every criterion gets
STEPS, MORE_STEPS = 100, 300
ALL_LRS = (3e-4, 1e-3)  # of training all experts, or all parameters, the references


@dataclass(frozen=True)
class Trial:
    """One training run; equal trials give equal results.

    Attributes:
        base: a key of `tasks.BASES`.
        task: what is trained on.
        criterion: a name of `choice.select`, "all" for all experts, "full" for all parameters, or "base" for no
            training.
        top_p: the budget: as many experts as the token share takes at this p; 0 for "all", "full" and "base".
        lr: constant learning rate.
        seed: order of the data, samples that are scored, random choice.
        where: "layer" gives each layer as many experts as the token share does, "global" ranks all experts together.
        steps: of the training.
    """

    base: str
    task: str
    criterion: str
    top_p: float = USUAL
    lr: float = SAME_LR
    seed: int = 0
    where: str = "layer"
    steps: int = STEPS


def schedule() -> Iterator[Trial]:
    """The trials in order."""
    seen = tuple(cell for cell in CELLS if cell in SEEN)
    plain = [cell for cell in (*FRESH, *seen) if cell.task in PLAIN]
    answers = [cell for cell in (*FRESH, *seen) if cell.task in ANSWERS]
    small = ("token", "gradnorm")
    main = (*small, "sink", "contrast")
    for cells in (FRESH, seen):
        for cell in cells:
            yield Trial(*cell, "base", 0.0, 0.0)
            yield from _trials([cell], ("token", "gradnorm", "sink" if cell.task in PLAIN else "answers", "contrast"))
            yield from _trials([cell], small, top_p=SMALL)
    yield from _trials(plain, ("gradnorm_rest",))
    yield from _again(FRESH, seed=1)
    yield from _trials(CELLS, ("random",))
    yield from _trials(CELLS, ("all",), top_p=0.0, lr=ALL_LRS[0])
    yield from _again(seen, seed=1)
    yield from _again((*FRESH, *seen), seed=2)
    yield from _trials(plain, ("sink_last",))
    yield from _trials(answers, ("sink",))
    for lr in OTHER_LRS:
        yield from _trials(CELLS, main, lr=lr)
    yield from _trials(CELLS, ("token",), steps=MORE_STEPS)
    yield from _trials(CELLS, ("token",), top_p=LARGE)
    yield from _trials(CELLS, ("all",), top_p=0.0, lr=ALL_LRS[1])
    yield from _trials(CELLS, ("full",), top_p=0.0, lr=ALL_LRS[0])
    yield from _trials(CELLS, ("gate", "saliency"))
    yield from _trials(CELLS, small, where="global")
    yield from _trials(CELLS, ("moved", "attention"))
    yield from _trials(CELLS, ("full",), top_p=0.0, lr=ALL_LRS[1])


def without_repeats(trials: Iterable[Trial], bases: Iterable[str] = BASES) -> Iterator[Trial]:
    """The trials of some bases, each once."""
    wanted, found = set(bases), set()
    for trial in trials:
        if trial.base in wanted and trial not in found:
            found.add(trial)
            yield trial


def _again(cells: Iterable[Cell], seed: int) -> Iterator[Trial]:
    """What the hypotheses without the first position are about, with another seed."""
    yield from _trials(cells, ("token", "gradnorm"), top_p=SMALL, seed=seed)
    yield from _trials(cells, ("token", "gradnorm", "contrast"), seed=seed)


def _trials(cells: Iterable[Cell], criteria: Iterable[str], **fields: object) -> Iterator[Trial]:
    for cell in cells:
        for criterion in criteria:
            yield Trial(*cell, criterion, **fields)
