"""Reads the records: a method's final runs, their metrics, means and spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from plan import GRID, chosen_lr, gentler_lr
from store import Record, Store


METRIC = {
    "verses": "exact", "signatures": "exact", "sections": "exact",
    "french": "tokens", "scripture": "tokens", "russian": "tokens",
}  # fmt: skip
DOMAIN = {
    "verses": "scripture", "signatures": "python", "sections": "russian",
    "scripture": "scripture", "russian": "russian",
}  # fmt: skip  # French is not in the general text
GENTLE = {"full_gentle": "full", "esft_gentle": "esft_token"}  # methods below their chosen learning rate


@dataclass(frozen=True)
class Value:
    """Mean and sample standard deviation over seeds; the latter None for a single run."""

    mean: float
    spread: float | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def text(self, digits: int) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def metric(record: Record, task: str | None = None) -> float:
    """The metric of a task, the trained one if None, in percent."""
    task = task or record["task"]
    return 100 * record["tasks"][task][METRIC[task]]


def task_loss(record: Record, task: str | None = None) -> float:
    """Nats per token of the answers."""
    return _number(record["tasks"][task or record["task"]]["loss"])


def general_loss(record: Record) -> float:
    """Nats per token of general text, mean over the domains that the trained task is not from."""
    return fmean(_number(found["loss"]) for found in _elsewhere(record))


def domain_loss(record: Record, domain: str) -> float:
    return _number(record["general"][domain]["loss"])


def general_right(record: Record) -> float:
    """The same for the share of right next tokens, in percent."""
    return 100 * fmean(found["tokens"] for found in _elsewhere(record))


def _number(loss: float | None) -> float:
    return float("nan") if loss is None else loss


def _elsewhere(record: Record) -> list[dict[str, float]]:
    return [found for domain, found in record["general"].items() if domain != DOMAIN.get(record["task"])]


class Results:
    """The records of one number of steps.

    Args:
        store: all records.
        steps: of the runs that count.
    """

    def __init__(self, store: Store, steps: int) -> None:
        self.store, self.steps = store, steps

    def tasks(self) -> list[str]:
        """The tasks that have a base and at least one method with a finished choice of its learning rate."""
        found = dict.fromkeys(record["task"] for record in self.store.records)
        return [task for task in found if self.finals(task, "full") and self.finals(task, "esft_token")]

    def base(self, task: str, group_size: int | None = None) -> Record:
        (record,) = self.store.select(task=task, method="base", group_size=group_size)
        return record

    def grid(self, task: str, method: str, top_p: float | None = None) -> list[Record]:
        """The runs that the learning rate was chosen by, in order of it."""
        found = self.store.select(task=task, method=method, seed=0, steps=self.steps, top_p=top_p, group_size=None)
        return sorted(found, key=lambda record: record["lr"])

    def lr(self, task: str, method: str, top_p: float | None = None) -> float | None:
        """The chosen learning rate; None before the neighbours of the best have been tried too."""
        if method in GENTLE:
            chosen = self.lr(task, GENTLE[method], top_p)
            return None if chosen is None else gentler_lr(chosen)
        tried = {record["lr"] for record in self.grid(task, method, top_p)}
        if not tried:
            return None
        best = chosen_lr(self.store, task, method, self.steps, top_p)
        place = GRID.index(best)
        return best if set(GRID[max(0, place - 1) : place + 2]) <= tried else None

    def finals(
        self, task: str, method: str, *, top_p: float | None = None, group_size: int | None = None
    ) -> list[Record]:
        """The runs at the chosen learning rate, one for each seed."""
        return self.store.select(
            task=task,
            method=GENTLE.get(method, method),
            lr=self.lr(task, method, top_p),
            steps=self.steps,
            top_p=top_p,
            group_size=group_size,
        )


def value(records: Sequence[Record], measure: Callable[[Record], float]) -> Value:
    return Value.of([measure(record) for record in records])
