"""Lists the runs of the comparison, the most important ones first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from continued import CONTINUED
from store import Store


GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CORE = ("full", "esft_token", "random", "lora_all")
FURTHER = ("lora_experts", "esft_gate", "hot_lora")
ABLATION = ("esft_non_expert", "non_expert")
SHARED = ("esft_shared", "esft_specialise", "shared")  # where there are shared experts
TOP_PS = (0.1, 0.4, 0.7)  # beside 0.2
GROUP_SIZES = (1, 2, 4, 8)
LONGER = 3  # times the steps: does more training change the picture?
LASTING = ("full", "esft_token")  # what is trained longer, and at a lower learning rate
MORE = 0.4  # p of ESFT-Token with more experts and more steps


@dataclass(frozen=True)
class Run:
    """One training run; equal runs give equal results.

    Attributes:
        task: what is trained on.
        method: a key of `methods.METHODS`.
        lr: constant learning rate.
        seed: order of the data, start of LoRA, choice of random experts.
        steps: of the optimizer.
        top_p: of the selection; None means the paper's.
        group_size: experts that a group of the simulated coarse model has; None trains the model as it is.
    """

    task: str
    method: str
    lr: float = 0.0
    seed: int = 0
    steps: int = 0
    top_p: float | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class Protocol:
    """The sizes of the comparison.

    Attributes:
        tasks: in order.
        repeated: those of them that get the further experiments.
        continued: tasks of plain text of domains that the base has seen.
        steps: of every run.
        grid: learning rates that every method is tried with, on seed 0.
        seeds: number of seeds at the chosen learning rate.
    """

    tasks: tuple[str, ...] = ("verses", "french", "signatures", "sections")
    repeated: tuple[str, ...] = ("verses", "french")
    continued: tuple[str, ...] = tuple(CONTINUED)
    steps: int = 100
    grid: tuple[float, ...] = GRID
    seeds: int = 3

    def only(self, names: Collection[str]) -> Protocol:
        """The part of it that is about some tasks, which no run of another task has a say in."""
        kept = {name: tuple(task for task in getattr(self, name) if task in names) for name in TASK_FIELDS}
        return replace(self, **kept)


TASK_FIELDS = ("tasks", "repeated", "continued")
Plan = Callable[[Protocol, Store], Iterator[Run]]


def plan(protocol: Protocol, store: Store) -> Iterator[Run]:
    """The runs in order. Learning rates that earlier runs decide are looked up when they are reached."""
    first = protocol.repeated
    later = tuple(task for task in protocol.tasks if task not in first)
    longer = LONGER * protocol.steps
    for task in first:
        yield Run(task, "base")
        yield from _grid(protocol, store, task, CORE)
    for task in first:
        yield from _seeds(protocol, store, task, CORE)
    for task in first:
        yield from _grid(protocol, store, task, FURTHER)
    for task in first:
        yield from _granularity(protocol, store, task, seed=0)
    for task in first:
        yield from _gentler(protocol, store, task)
    for task in first:
        yield from _grid(protocol, store, task, LASTING, longer)
    for task in first:
        yield from _grid(protocol, store, task, ("esft_token",), longer, MORE)
        yield from (Run(task, "full", protocol.grid[0], 0, steps) for steps in (longer, protocol.steps))
    for task in protocol.continued[:1]:
        yield Run(task, "base")
        yield from _grid(protocol, store, task, CORE)
    for task in first:
        yield from _grid(protocol, store, task, ABLATION)
    for task in protocol.continued[:1]:
        yield from _seeds(protocol, store, task, CORE)
    for task in first:
        yield from _seeds(protocol, store, task, FURTHER)
    for task in protocol.continued[1:]:
        yield Run(task, "base")
        yield from _grid(protocol, store, task, CORE)
    for task in reversed(first):
        for top_p in TOP_PS:
            yield from _grid(protocol, store, task, ("esft_token",), top_p=top_p)
    for task in later:
        yield Run(task, "base")
        yield from _grid(protocol, store, task, CORE)
    for task in protocol.continued[1:]:
        yield from _seeds(protocol, store, task, CORE)
    for task in first:
        yield from _seeds(protocol, store, task, LASTING, longer)
    for seed in range(1, protocol.seeds):
        for task in reversed(first):
            yield from _granularity(protocol, store, task, seed)
    for task in first:
        yield from _seeds(protocol, store, task, ABLATION)
        for top_p in TOP_PS:
            yield from _seeds(protocol, store, task, ("esft_token",), top_p=top_p)
    for task in later:
        yield from _seeds(protocol, store, task, CORE)
        yield from _grid(protocol, store, task, FURTHER)
        yield from _seeds(protocol, store, task, FURTHER)


def plan_with_shared_experts(protocol: Protocol, store: Store) -> Iterator[Run]:
    """The same on a base that has shared experts: the paper's ablation, more experts, coarser models."""
    names = (*protocol.continued, *protocol.tasks)
    for task in names:
        yield Run(task, "base")
        yield from _grid(protocol, store, task, CORE)
        yield from _grid(protocol, store, task, SHARED)
    for task in names:
        yield from _seeds(protocol, store, task, (*CORE, *SHARED))
    for task in names:
        yield from _grid(protocol, store, task, ("esft_token",), top_p=MORE)
        yield from _seeds(protocol, store, task, ("esft_token",), top_p=MORE)
        yield from _gentler(protocol, store, task)
    for task in names:
        yield from _grid(protocol, store, task, ("esft_gate",))
        yield from _seeds(protocol, store, task, ("esft_gate",))
    for seed in range(protocol.seeds):
        for task in protocol.repeated:
            yield from _granularity(protocol, store, task, seed)


def chosen_lr(store: Store, task: str, method: str, steps: int, top_p: float | None = None) -> float:
    """The learning rate of the least validation loss of the grid's runs.

    Raises:
        ValueError: if there are no such runs.
    """
    losses = {
        record["lr"]: loss
        for record in store.select(task=task, method=method, seed=0, steps=steps, top_p=top_p, group_size=None)
        if (loss := record["validation"]["loss"]) is not None
    }
    if not losses:
        raise ValueError(f"no run of {method} on {task} in {store.path} has a validation loss; run the grid first")
    return min(losses, key=lambda lr: losses[lr])


def gentler_lr(lr: float) -> float | None:
    """The next lower learning rate of the grid; None for the lowest."""
    place = GRID.index(lr)
    return GRID[place - 1] if place else None


def _grid(
    protocol: Protocol,
    store: Store,
    task: str,
    methods: tuple[str, ...],
    steps: int | None = None,
    top_p: float | None = None,
) -> Iterator[Run]:
    """From the middle of the grid towards the side where the validation loss falls, as long as it does."""
    grid = protocol.grid
    steps = steps or protocol.steps
    for method in methods:
        low = (len(grid) - 1) // 2
        high = min(low + 1, len(grid) - 1)
        while True:
            for lr in grid[low : high + 1]:
                yield Run(task, method, lr, 0, steps, top_p)
            best = grid.index(chosen_lr(store, task, method, steps, top_p))
            if best <= low and low > 0:
                low -= 1
            elif best >= high and high < len(grid) - 1:
                high += 1
            else:
                break


def _seeds(
    protocol: Protocol,
    store: Store,
    task: str,
    methods: tuple[str, ...],
    steps: int | None = None,
    top_p: float | None = None,
) -> Iterator[Run]:
    steps = steps or protocol.steps
    for seed in range(1, protocol.seeds):
        for method in methods:
            yield Run(task, method, chosen_lr(store, task, method, steps, top_p), seed, steps, top_p)


def _gentler(protocol: Protocol, store: Store, task: str) -> Iterator[Run]:
    """Below the chosen learning rate, where less is forgotten."""
    for method in LASTING:
        lr = gentler_lr(chosen_lr(store, task, method, protocol.steps))
        for seed in range(protocol.seeds if lr else 0):
            yield Run(task, method, lr, seed, protocol.steps)


def _granularity(protocol: Protocol, store: Store, task: str, seed: int) -> Iterator[Run]:
    for size in GROUP_SIZES:
        if seed == 0:
            yield Run(task, "base", group_size=size)
        for method in ("full", "esft_token"):
            lr = chosen_lr(store, task, method, protocol.steps)
            yield Run(task, method, lr, seed, protocol.steps, group_size=size)
