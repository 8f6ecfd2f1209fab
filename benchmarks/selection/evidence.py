"""Compares criteria with the token share, paired by cell and seed, and tests the protocol's hypotheses."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Any

from cells import ANSWERS, BASES, CELLS, FRESH, PLAIN, Cell
from schedule import SAME_LR, SMALL, STEPS, USUAL
from store import Record


REFERENCE = "token"
Measure = Callable[[Record, Record], float]  # of a record, compared with that of the token share


def task_loss(record: Record) -> float:
    """Nats per trained token, without the first one of a row of plain text."""
    return record["rest"] if record["task"] in PLAIN else record["loss"]


def general_loss(record: Record) -> float:
    """Nats per token of general text, mean over the domains that the task is not from."""
    return fmean(record["general"].values())


def task_change(record: Record, reference: Record) -> float:
    """Change of the task loss in per cent of the reference's, as 100 times the logarithm of the ratio."""
    return 100 * math.log(task_loss(record) / task_loss(reference))


def whole_change(record: Record, reference: Record) -> float:
    """The same of the loss with the first token."""
    return 100 * math.log(record["loss"] / reference["loss"])


def forgetting_change(record: Record, reference: Record) -> float:
    """Difference of the general loss in nats."""
    return general_loss(record) - general_loss(reference)


def unseen_change(record: Record, reference: Record) -> float:
    """The same on the domains whose text `contrast` does not see."""
    unseen = sorted(record["general"])[1::2]
    return fmean(record["general"][name] - reference["general"][name] for name in unseen)


MEASURES: dict[str, Measure] = {
    "task loss, %": task_change,
    "task loss with the first token, %": whole_change,
    "forgetting, nats": forgetting_change,
}


@dataclass(frozen=True)
class Setting:
    """What is compared with the token share.

    Attributes:
        criterion: its name.
        top_p: the budget of both.
        where: of the criterion; the token share has it by layer.
        lr: of both; None means each one's own best.
        reference_p: budget of the token share, if it is another one.
        reference_lr: learning rate of the token share, if it is another one.
    """

    criterion: str
    top_p: float = USUAL
    where: str = "layer"
    lr: float | None = SAME_LR
    reference_p: float | None = None
    reference_lr: float | None = None


@dataclass(frozen=True)
class Hypothesis:
    """A test of the protocol.

    Attributes:
        setting: what is compared.
        measure: a key of `MEASURES`, which is to be lower.
        tasks: of the cells that count.
    """

    setting: Setting
    measure: str
    tasks: Collection[str] = (*PLAIN, *ANSWERS)


HYPOTHESES = (
    Hypothesis(Setting("sink"), "task loss with the first token, %", PLAIN),
    Hypothesis(Setting("sink"), "task loss, %", PLAIN),
    Hypothesis(Setting("gradnorm", SMALL), "task loss, %"),
    Hypothesis(Setting("gradnorm"), "task loss, %"),
    Hypothesis(Setting("contrast"), "forgetting, nats"),
)


@dataclass(frozen=True)
class Changes:
    """Changes against the token share, by cell, each a mean over its seeds.

    Attributes:
        by_cell: the changes.
        trials: how many pairs of trials they are from.
    """

    by_cell: Mapping[Cell, float]
    trials: int

    def of(self, cells: Collection[Cell]) -> list[float]:
        """The changes of some cells, those that there are."""
        return [change for cell, change in self.by_cell.items() if cell in cells]

    def by_base(self) -> dict[str, float]:
        """The mean of each base that has cells."""
        found = {base: [change for cell, change in self.by_cell.items() if cell.base == base] for base in BASES}
        return {base: fmean(changes) for base, changes in found.items() if changes}


class Evidence:
    """The records of all trials.

    Args:
        records: as the trials wrote them.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)

    def find(self, **wanted: Any) -> list[Record]:
        """The records whose fields have these values."""
        return [record for record in self.records if all(record[name] == value for name, value in wanted.items())]

    def seeds(
        self, cell: Cell, criterion: str, top_p: float, where: str, lr: float, steps: int = STEPS
    ) -> dict[int, Record]:
        """The results of a criterion, by seed."""
        found = self.find(**cell._asdict(), criterion=criterion, top_p=top_p, where=where, lr=lr, steps=steps)
        return {record["seed"]: record for record in found}

    def best_lr(self, cell: Cell, criterion: str, top_p: float, where: str) -> float | None:
        """The learning rate of the least validation loss of seed 0; None before all three have been tried."""
        found = self.find(**cell._asdict(), criterion=criterion, top_p=top_p, where=where, seed=0, steps=STEPS)
        losses = {record["lr"]: record["validation"] for record in found}
        return min(losses, key=lambda lr: losses[lr]) if len(losses) == 3 else None

    def changes(self, setting: Setting, measure: Measure, cells: Collection[Cell] = CELLS) -> Changes:
        """Changes of a setting against the token share."""
        by_cell, trials = {}, 0
        for cell in CELLS:
            if cell not in cells:
                continue
            own = self._at(cell, setting.criterion, setting.top_p, setting.where, setting.lr)
            others = self._at(
                cell, REFERENCE, setting.reference_p or setting.top_p, "layer", setting.reference_lr or setting.lr
            )
            pairs = [measure(record, others[seed]) for seed, record in own.items() if seed in others]
            if pairs:
                by_cell[cell] = fmean(pairs)
                trials += len(pairs)
        return Changes(by_cell, trials)

    def _at(self, cell: Cell, criterion: str, top_p: float, where: str, lr: float | None) -> dict[int, Record]:
        rate = self.best_lr(cell, criterion, top_p, where) if lr is None else lr
        return {} if rate is None else self.seeds(cell, criterion, top_p, where, rate)

    def tests(self) -> list[tuple[Hypothesis, Changes, float, float]]:
        """The protocol's hypotheses on the fresh cells: changes, p, and p after Holm's correction."""
        found = []
        for hypothesis in HYPOTHESES:
            cells = [cell for cell in FRESH if cell.task in hypothesis.tasks]
            changes = self.changes(hypothesis.setting, MEASURES[hypothesis.measure], cells)
            found.append((hypothesis, changes, sign_flip(list(changes.by_cell.values()))))
        corrected = holm([p for _, _, p in found])
        return [(*test, p) for test, p in zip(found, corrected, strict=True)]


def sign_flip(changes: Sequence[float]) -> float:
    """Exact two-sided p of a mean of 0, if each change is as likely as its negative; 1.0 without changes."""
    if not changes:
        return 1.0
    observed = abs(sum(changes)) * (1 - 1e-12)
    sums = [
        abs(sum(sign * change for sign, change in zip(signs, changes, strict=True)))
        for signs in product((1, -1), repeat=len(changes))
    ]
    return sum(total >= observed for total in sums) / len(sums)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's method, in the order given."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    return stdev(values) if len(values) > 1 else 0.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, by ranks in the mean of ties."""
    return _correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in list(values)]


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    own, other = fmean(first), fmean(second)
    products = sum((a - own) * (b - other) for a, b in zip(first, second, strict=True))
    lengths = math.sqrt(sum((a - own) ** 2 for a in first) * sum((b - other) ** 2 for b in second))
    return products / lengths if lengths else 0.0
