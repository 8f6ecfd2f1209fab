"""Writes the tables and the figure of the comparison from its records.

python benchmarks/selection/choosing_page.py
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "paper"), str(HERE.parent), str(ROOT / "examples" / "tiny_moe")]

from peft_esft.analysis.drawing import PRINT, Plot, Style, render  # noqa: E402

from cells import ANSWERS, BASES, CELLS, FRESH, PLAIN, Cell  # noqa: E402
from evidence import (  # noqa: E402
    MEASURES,
    REFERENCE,
    Changes,
    Evidence,
    Setting,
    forgetting_change,
    general_loss,
    rank_correlation,
    spread,
    task_change,
    task_loss,
    unseen_change,
    whole_change,
)
from reporting import RESULTS, fill_tables  # noqa: E402
from schedule import (  # noqa: E402
    ALL_LRS,
    LARGE,
    MORE_STEPS,
    OTHER_LRS,
    SAME_LR,
    SEEDS,
    SMALL,
    STEPS,
    USUAL,
    schedule,
    without_repeats,
)
from store import Record, Store  # noqa: E402


FOLDER = RESULTS / "selection"
PAGE = ROOT / "docs" / "criteria.md"
FIGURE = ROOT / "docs" / "figures" / "criteria.svg"
NAMES = {
    "token": "token share",
    "gate": "gate",
    "gradnorm": "gradient norm",
    "gradnorm_rest": "gradient norm, first token left out",
    "saliency": "saliency",
    "contrast": "contrast",
    "answers": "token share where answers are predicted",
    "sink": "token share + first position",
    "sink_last": "token share + first position, last layer",
    "moved": "change in eight trial steps",
    "attention": "half of the token share's, and attention in low rank",
    "random": "random",
    "all": "all experts",
    "full": "all parameters",
}
ROWS = (
    *(Setting(name) for name in NAMES if name not in ("token", "all", "full")),
    *(Setting(name, where="global") for name in ("token", "gradnorm")),
    Setting("gradnorm", SMALL),
    *(Setting(name, lr=None) for name in ("gradnorm", "sink", "contrast")),
    *(Setting("token", top_p, reference_p=USUAL) for top_p in (SMALL, LARGE)),
    *(Setting("all", 0.0, lr=lr, reference_p=USUAL, reference_lr=SAME_LR) for lr in ALL_LRS),
    *(Setting("full", 0.0, lr=lr, reference_p=USUAL, reference_lr=SAME_LR) for lr in ALL_LRS),
)
DRAWN = {
    **{name: [Setting(name, p, reference_p=USUAL) for p in (SMALL, USUAL, LARGE)]
       for name in ("token", "gradnorm", "contrast", "random")},
    "all": [Setting("all", 0.0, lr=ALL_LRS[1], reference_p=USUAL, reference_lr=SAME_LR)],
    "full": [Setting("full", 0.0, lr=ALL_LRS[0], reference_p=USUAL, reference_lr=SAME_LR)],
}  # fmt: skip


def load(folder: Path = FOLDER) -> list[Record]:
    """The records of both bases."""
    return [record for base in BASES for record in Store(folder / f"{base}.jsonl").records]


def tables(evidence: Evidence) -> dict[str, str]:
    """The tables by name."""
    return {
        "comparison": comparison(evidence),
        "tests": tests(evidence),
        "limits": limits(evidence),
        "unseen": unseen(evidence),
        "by_task": by_task(evidence),
        "cost": cost(evidence),
        "before": before(evidence),
        "progress": progress(evidence),
    }


def comparison(evidence: Evidence) -> str:
    """Changes against the token share, a row for each setting that has results."""
    header = ("criterion", "experts", "lr", "task loss, %", "better in", "all cells, %", "with the first token, %",
              "forgetting, nats", "all cells, nats", "corrected p", "pairs")  # fmt: skip
    corrected = {(test.setting, test.measure): p for test, _, _, p in evidence.tests()}
    rows = []
    for setting in ROWS:
        task = evidence.changes(setting, task_change)
        if not task.by_cell:
            continue
        whole, forgotten = (evidence.changes(setting, measure) for measure in (whole_change, forgetting_change))
        fresh = task.of(FRESH)
        found = [f"{name.partition(',')[0]}: {corrected[setting, name]:.2f}" for name in MEASURES
                 if (setting, name) in corrected]  # fmt: skip
        rows.append((
            NAMES[setting.criterion] + (", all layers together" if setting.where == "global" else ""),
            _budget(setting),
            "own best" if setting.lr is None else f"{setting.lr:g}",
            _mean(fresh, 1),
            f"{sum(change < 0 for change in fresh)} of {len(fresh)}",
            _mean(task.of(CELLS), 1),
            _mean(whole.of(FRESH), 1),
            _mean(forgotten.of(FRESH), 3),
            _mean(forgotten.of(CELLS), 3),
            "; ".join(found),
            str(task.trials),
        ))  # fmt: skip
    return _markdown(header, rows)


def _budget(setting: Setting) -> str:
    if setting.criterion in ("all", "full"):
        return "all"
    return (
        f"p {setting.top_p:g}" if setting.criterion == REFERENCE and setting.reference_p else f"as p {setting.top_p:g}"
    )


def tests(evidence: Evidence) -> str:
    """The protocol's tests."""
    header = ("criterion", "experts", "measure", "change", *BASES, "better in", "p", "corrected", "pairs")
    rows = []
    for hypothesis, changes, p, corrected in evidence.tests():
        values = list(changes.by_cell.values())
        digits = 3 if "nats" in hypothesis.measure else 1
        by_base = changes.by_base()
        rows.append((
            NAMES[hypothesis.setting.criterion],
            f"as p {hypothesis.setting.top_p:g}",
            hypothesis.measure,
            _mean(values, digits),
            *(f"{by_base[base]:+.{digits}f}" if base in by_base else "" for base in BASES),
            f"{sum(value < 0 for value in values)} of {len(values)}",
            f"{p:.3f}",
            f"{corrected:.3f}",
            str(changes.trials),
        ))  # fmt: skip
    return _markdown(header, rows)


def limits(evidence: Evidence) -> str:
    """How much of what all parameters gain the token share's experts gain, and with more of one thing each."""
    ways: dict[str, list[tuple[str, float, float, int]]] = {
        "token share, p 0.2": [("token", USUAL, SAME_LR, STEPS)],
        "best of three learning rates": [("token", USUAL, lr, STEPS) for lr in (SAME_LR, *OTHER_LRS)],
        "p 0.4": [("token", LARGE, SAME_LR, STEPS)],
        "three times the steps": [("token", USUAL, SAME_LR, MORE_STEPS)],
        "all experts, best of two learning rates": [("all", 0.0, lr, STEPS) for lr in ALL_LRS],
    }
    found = {}
    for cell in CELLS:
        base = evidence.seeds(cell, "base", 0.0, "layer", 0.0).get(0)
        full = _best(evidence, cell, [("full", 0.0, lr, STEPS) for lr in ALL_LRS])
        own = [_best(evidence, cell, trials) for trials in ways.values()]
        if base and full and all(own):
            gain = task_loss(base) - task_loss(full)
            found[cell] = [100 * (task_loss(base) - task_loss(record)) / gain for record in own if record]
    if not found:
        return ""
    rows = [(*cell, *(f"{share:.0f}" for share in shares)) for cell, shares in found.items()]
    rows.append(("mean", "", *(f"{fmean(shares):.0f}" for shares in zip(*found.values(), strict=True))))
    return _markdown(("base", "task", *ways), rows)


def _best(evidence: Evidence, cell: Cell, trials: Sequence[tuple[str, float, float, int]]) -> Record | None:
    """The result of seed 0 with the least validation loss; None if one is missing."""
    found = [evidence.seeds(cell, name, top_p, "layer", lr, steps).get(0) for name, top_p, lr, steps in trials]
    records = [record for record in found if record is not None]
    return min(records, key=lambda record: record["validation"]) if len(records) == len(found) else None


def unseen(evidence: Evidence) -> str:
    """Forgetting by contrast: on all domains, and on those whose text it does not see."""
    header = ("cells", "all domains, nats", "domains that contrast does not see, nats", "pairs")
    rows = []
    for name, cells in (("fresh", FRESH), ("all", CELLS)):
        found = [evidence.changes(Setting("contrast"), one, cells) for one in (forgetting_change, unseen_change)]
        rows.append((name, *(_mean(changes.of(cells), 3) for changes in found), str(found[0].trials)))
    return _markdown(header, rows)


def by_task(evidence: Evidence) -> str:
    """What came out in each cell at the common learning rate: mean and standard deviation over the seeds."""
    header = ("base", "task", "criterion", "experts", "task loss", "first token", "with the first token", "exact, %",
              "general loss", "trained experts", "seeds")  # fmt: skip
    rows = []
    for cell in CELLS:
        base = evidence.seeds(cell, "base", 0.0, "layer", 0.0)
        rows += [_result(cell, "base", "", base)] if base else []
        for name in NAMES:
            for top_p, where in ((SMALL, "layer"), (USUAL, "layer"), (USUAL, "global"), (LARGE, "layer")):
                found = evidence.seeds(cell, name, top_p, where, SAME_LR)
                label = f"p {top_p:g}" + (", all layers together" if where == "global" else "")
                rows += [_result(cell, NAMES[name], label, found)] if found else []
        found = evidence.seeds(cell, "token", USUAL, "layer", SAME_LR, MORE_STEPS)
        rows += [_result(cell, NAMES["token"], f"p {USUAL:g}, {MORE_STEPS} steps", found)] if found else []
        for name, lr in product(("all", "full"), ALL_LRS):
            found = evidence.seeds(cell, name, 0.0, "layer", lr)
            rows += [_result(cell, NAMES[name], f"lr {lr:g}", found)] if found else []
    return _markdown(header, rows)


def _result(cell: Cell, name: str, label: str, found: dict[int, Record]) -> tuple[str, ...]:
    records = list(found.values())
    chosen = [sum(map(len, record["experts"])) for record in records if record["experts"] is not None]
    return (
        cell.base,
        cell.task,
        name,
        label,
        _plain([task_loss(record) for record in records]),
        _plain([record["first"] for record in records]) if cell.task in PLAIN else "",
        _plain([record["loss"] for record in records]) if cell.task in PLAIN else "",
        f"{100 * fmean(record['exact'] for record in records):.1f}" if cell.task in ANSWERS else "",
        _plain([general_loss(record) for record in records]),
        f"{fmean(chosen):.1f}" if chosen else "",
        str(len(records)),
    )


def cost(evidence: Evidence) -> str:
    """CPU time of scoring, by criterion."""
    rows = []
    for name in NAMES:
        found = [r for r in evidence.records if r["criterion"] == name and r["seed"] == 0 and r["scored_tokens"]]
        if found:
            tokens = sum(record["scored_tokens"] for record in found)
            seconds = sum(record["scoring_seconds"] for record in found)
            rows.append((NAMES[name], f"{seconds / len(found):.1f}", f"{tokens / len(found):,.0f}",
                         f"{1000 * seconds / tokens:.2f}"))  # fmt: skip
    return _markdown(("criterion", "CPU seconds", "tokens", "seconds for 1,000 tokens"), rows)


def before(evidence: Evidence) -> str:
    """What is known before training, against what the gradient norm turned out to change."""
    rows, known = [], []
    for cell in CELLS:
        changes = [evidence.changes(Setting("gradnorm", top_p), task_change, [cell]) for top_p in (SMALL, USUAL)]
        token, own = (evidence.seeds(cell, name, USUAL, "layer", SAME_LR) for name in (REFERENCE, "gradnorm"))
        base = evidence.seeds(cell, "base", 0.0, "layer", 0.0)
        if not (all(change.by_cell for change in changes) and base and set(token) & set(own)):
            continue
        seed = min(set(token) & set(own))
        count = sum(map(len, token[seed]["experts"]))
        shared = sum(len({*a} & {*b}) for a, b in zip(token[seed]["experts"], own[seed]["experts"], strict=True))
        numbers = (task_loss(base[0]), count, shared / count, *(change.by_cell[cell] for change in changes))
        known.append(numbers)
        rows.append((cell.base, cell.task, f"{numbers[0]:.2f}", str(count), f"{100 * numbers[2]:.0f}",
                     f"{numbers[3]:+.1f}", f"{numbers[4]:+.1f}"))  # fmt: skip
    if len(known) > 2:
        columns = list(zip(*known, strict=True))
        for place, name in ((3, "p 0.1"), (4, "p 0.2")):
            with_change = [f"{rank_correlation(columns[number], columns[place]):+.2f}" for number in range(3)]
            rows.append(("", f"rank correlation with the change at {name}", *with_change, "", ""))
    header = ("base", "task", "loss of the base", "experts at p 0.2", "shared with the gradient norm's, %",
              "gradient norm, as p 0.1, %", "as p 0.2, %")  # fmt: skip
    return _markdown(header, rows)


def progress(evidence: Evidence) -> str:
    """How many trials of the schedule there are."""
    planned = list(without_repeats(schedule()))
    header = ("criterion", *(f"p {p:g}, seed {s}" for p in (SMALL, USUAL, LARGE) for s in SEEDS), "in all")
    rows = []
    for name in ("base", *NAMES):
        own = [record for record in evidence.records if record["criterion"] == name]
        at = [sum(r["top_p"] == p and r["seed"] == s for r in own) for p in (SMALL, USUAL, LARGE) for s in SEEDS]
        rows.append((NAMES.get(name, name), *(str(number or "") for number in at),
                     f"{len(own)} of {sum(trial.criterion == name for trial in planned)}"))  # fmt: skip
    rows.append(("in all", *("" for _ in range(9)), f"{len(evidence.records)} of {len(planned)}"))
    return _markdown(header, rows)


def plot(evidence: Evidence) -> Plot:
    """Task loss and forgetting against trained bytes, relative to the token share at p = 0.2."""
    curves: dict[str, list[tuple[float, float, float, int]]] = {}
    for name, settings in DRAWN.items():
        found = [(setting, evidence.changes(setting, task_change)) for setting in settings]
        points = [
            (_share(evidence, setting), *_centre(changes), changes.trials)
            for setting, changes in found
            if len(changes.by_cell) == len(CELLS)
        ]
        if points:
            curves[NAMES[name]] = points
    return Plot(
        name="criteria",
        title="What is learned with the experts that a criterion chooses",
        caption="Change of the task loss against the token share at p = 0.2, mean and standard error over the "
        "fourteen cells. Lower is better.",
        header=("criterion", "trained_share", "change_of_task_loss", "standard_error", "pairs"),
        rows=[(name, *point) for name, points in curves.items() for point in points],
        draw=partial(_draw, curves=curves),
    )


def _share(evidence: Evidence, setting: Setting) -> float:
    """Per cent of all experts that are trained, mean over the cells."""
    found = []
    for cell in CELLS:
        lr = SAME_LR if setting.lr is None else setting.lr
        records = evidence.seeds(cell, setting.criterion, setting.top_p, setting.where, lr)
        found += [_trained_share(record) for record in records.values()]
    return 100 * fmean(found)


def _trained_share(record: Record) -> float:
    """Both bases have 64 experts per layer."""
    experts = record["experts"]
    return 1.0 if experts is None else fmean(len(ids) / 64 for ids in experts)


def _centre(changes: Changes) -> tuple[float, float]:
    values = changes.of(CELLS)
    return fmean(values), spread(values) / len(values) ** 0.5


def _draw(axes: Any, style: Style, curves: dict[str, list[tuple[float, float, float, int]]]) -> None:
    for place, (name, points) in enumerate(curves.items()):
        x, y, error, _ = zip(*points, strict=True)
        apart = [min(100.0, value * 1.02 ** (place - 1)) for value in x]
        axes.errorbar(apart, y, yerr=error, capsize=2, linewidth=1.4, label=name, **style.look(place))
    axes.axhline(0, color=style.muted, linewidth=1, linestyle="--")
    axes.set(
        xscale="log",
        xlim=(2.4, 120),
        xlabel="trained experts, % of all",
        ylabel="task loss over\ntoken share at p 0.2, %",
    )
    axes.set_xticks((3, 5, 10, 30, 100), ("3", "5", "10", "30", "100"))
    axes.set_xticks((), minor=True)
    if curves:
        axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _mean(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over cells."""
    if not values:
        return ""
    return f"{fmean(values):+.{digits}f} ± {spread(values):.{digits}f}"


def _plain(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def _markdown(header: Collection[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    evidence = Evidence(load())
    found = tables(evidence)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in found.items() if table)
    (FOLDER / "tables.md").write_text(f"# Tables of the comparison of criteria\n\n{text}\n")
    PAGE.write_text(fill_tables(PAGE.read_text(), found))
    FIGURE.write_bytes(render(plot(evidence), PRINT)["svg"])


if __name__ == "__main__":
    main()
