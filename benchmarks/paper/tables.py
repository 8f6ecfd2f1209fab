"""The tables, in the form of the paper's, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import tasks
from plan import ABLATION, CORE, FURTHER, GRID, GROUP_SIZES, LONGER, MORE, SHARED, TOP_PS
from results import GENTLE, METRIC, Results, domain_loss, general_loss, general_right, metric, task_loss, value
from store import Record


NAMES = {
    "base": "base",
    "full": "full fine-tuning",
    "full_gentle": "full fine-tuning, a third of the lr",
    "lora_all": "LoRA r 8, everything",
    "lora_experts": "LoRA r 8, all experts",
    "esft_token": "ESFT-Token, p 0.2",
    "esft_gentle": "ESFT-Token, p 0.2, a third of the lr",
    "esft_gate": "ESFT-Gate, p 0.1",
    "hot_lora": "LoRA r 8, ESFT-Token's experts",
    "random": "random experts, as many as ESFT-Token",
    "esft_shared": "ESFT-Token + shared experts",
    "esft_specialise": "ESFT-Token + shared experts + all non-expert modules",
    "esft_non_expert": "ESFT-Token + all non-expert modules",
    "shared": "shared experts only",
    "non_expert": "non-expert modules only",
}
SHORT = {
    "full": "full fine-tuning",
    "full_gentle": "full fine-tuning, lr / 3",
    "lora_all": "LoRA, everything",
    "lora_experts": "LoRA, all experts",
    "esft_token": "ESFT-Token",
    "esft_gentle": "ESFT-Token, lr / 3",
    "esft_gate": "ESFT-Gate",
    "hot_lora": "LoRA, ESFT's experts",
    "random": "random experts",
}
ORDER = [name for name in NAMES if name in {*CORE, *FURTHER, *GENTLE}]
ESFT = ("esft_token", "esft_gentle")
TRAINED = ("esft_token", "esft_shared", "esft_specialise", "esft_non_expert", "shared", "non_expert", "full")
MEASURE = {"exact": "exact answers, %", "tokens": "right next tokens, %"}
SHARES = ["of full's gain", "of full's general loss added"]
Timing = dict[str, dict[str, float]]


def all_tables(results: Results, timing: Timing) -> dict[str, str]:
    """Every table of the tasks that there are results for, by name; empty where its runs are missing."""
    found = {}
    for task in results.tasks():
        found[f"main_{task}"] = main(results, task, timing)
        found[f"grid_{task}"] = grid(results, task)
        found[f"forgetting_{task}"] = forgetting(results, task)
        found[f"domains_{task}"] = domains(results, task)
        found[f"trained_{task}"] = what_is_trained(results, task)
        found[f"top_p_{task}"] = top_p(results, task)
        found[f"granularity_{task}"] = granularity(results, task)
        found[f"longer_{task}"] = longer(results, task)
    return {**found, "summary": summary(results)}


def main(results: Results, task: str, timing: Timing) -> str:
    """Task, general text, and cost of every method."""
    base = results.base(task)
    header = [
        "method", MEASURE[METRIC[task]], "loss", "general loss", "general tokens right, %", "experts per layer",
        "trained parameters", "saved MB", "time", "lr", "seeds",
    ]  # fmt: skip
    rows = [["base", *_quality([base]), "", "0", "", "", "", ""]]
    for method in ORDER:
        records = results.finals(task, method)
        if records:
            ratio = timing.get(task, {}).get(GENTLE.get(method, method))
            rows.append(
                [
                    NAMES[method], *_quality(records), _experts(records[0]), f"{records[0]['trained_parameters']:,}",
                    f"{records[0]['saved_bytes'] / 1e6:.2f}", "" if ratio is None else f"{ratio:.2f}",
                    f"{records[0]['lr']:g}", str(len(records)),
                ]
            )  # fmt: skip
    return markdown(header, rows)


def summary(results: Results) -> str:
    """Of what full fine-tuning gains and loses, how much the others do: metric, loss, general loss."""
    names = [task for task in results.tasks() if all(results.finals(task, method) for method in CORE)]
    rows = []
    for method in (*ORDER, *SHARED):
        cells = [
            " · ".join(f"{100 * share:.0f}" for share in shares_of_full(results, task, method))
            if results.finals(task, method)
            else ""
            for task in names
        ]
        if method != "full" and any(cells):
            rows.append([NAMES[method], *cells])
    return markdown(["of full fine-tuning's, %", *names], rows) if names else ""


def shares_of_full(results: Results, task: str, method: str) -> tuple[float, float, float]:
    """What a method gains in metric and in loss and adds to the general loss, over the same of full fine-tuning."""
    base, full, own = results.base(task), results.finals(task, "full"), results.finals(task, method)
    gained, learnt, added = (_share(base, full, own, measure) for measure in (metric, task_loss, general_loss))
    return gained, learnt, added


def _shares(results: Results, task: str, own: Sequence[Record]) -> list[str]:
    """The same as cells, of metric and general loss."""
    base, full = results.base(task), results.finals(task, "full")
    return [f"{100 * _share(base, full, own, measure):.0f} %" for measure in (metric, general_loss)]


def _share(base: Record, full: Sequence[Record], own: Sequence[Record], measure: Callable[[Record], float]) -> float:
    """What one method changes over what full fine-tuning changes."""
    return (value(own, measure).mean - measure(base)) / (value(full, measure).mean - measure(base))


def grid(results: Results, task: str) -> str:
    """Every run that the learning rates were chosen by."""
    header = ["method", *(f"lr {lr:g}" for lr in GRID)]
    rows = []
    for method in (*ORDER, *SHARED, *ABLATION):
        records = {record["lr"]: record for record in results.grid(task, method)}
        if records:
            chosen = results.lr(task, method)
            rows.append([NAMES[method], *(_grid_cell(records.get(lr), lr == chosen) for lr in GRID)])
    return markdown(header, rows)


def forgetting(results: Results, task: str) -> str:
    """The tasks that were not trained: loss, and right tokens of the answers."""
    others = [other for other in tasks.TASKS if other != task]
    header = ["method", *(f"{other}: {what}" for other in others for what in ("loss", "tokens right, %"))]
    rows = []
    for method in ("base", *ORDER):
        records = [results.base(task)] if method == "base" else results.finals(task, method)
        if records:
            cells = [
                text
                for other in others
                for text in (
                    value(records, lambda record, other=other: task_loss(record, other)).text(2),
                    value(records, lambda record, other=other: 100 * record["tasks"][other]["tokens"]).text(1),
                )
            ]
            rows.append([NAMES[method], *cells])
    return markdown(header, rows)


def domains(results: Results, task: str) -> str:
    """General loss by domain."""
    base = results.base(task)
    header = ["method", *base["general"]]
    rows = []
    for method in ("base", *ORDER):
        records = [base] if method == "base" else results.finals(task, method)
        if records:
            cells = [
                value(records, lambda record, domain=domain: domain_loss(record, domain)).text(2)
                for domain in base["general"]
            ]
            rows.append([NAMES[method], *cells])
    return markdown(header, rows)


def what_is_trained(results: Results, task: str) -> str:
    """The paper's ablation, with what of it a model without shared experts allows."""
    rows = []
    for method in TRAINED:
        records = results.finals(task, method)
        if records:
            shares = ["", ""] if method == "full" else _shares(results, task, records)
            parameters = f"{records[0]['trained_parameters']:,}"
            rows.append([NAMES[method], *_quality(records), *shares, parameters, str(len(records))])
    header = ["what is trained", *_quality_header(task), *SHARES, "trained parameters", "seeds"]
    return markdown(header, rows) if len(rows) > 2 else ""


def top_p(results: Results, task: str) -> str:
    """More and fewer experts."""
    rows = []
    for p in sorted((*TOP_PS, 0.2)):
        records = results.finals(task, "esft_token", top_p=None if p == 0.2 else p)
        if records:
            rows.append(
                [
                    f"{p:g}", _experts(records[0]), f"{records[0]['trained_parameters']:,}", *_quality(records),
                    *_shares(results, task, records), f"{records[0]['lr']:g}", str(len(records)),
                ]
            )  # fmt: skip
    header = ["p", "experts per layer", "trained parameters", *_quality_header(task), *SHARES, "lr", "seeds"]
    return markdown(header, rows) if len(rows) > 1 else ""


def granularity(results: Results, task: str) -> str:
    """ESFT-Token and full fine-tuning on simulated coarser models."""
    rows = []
    for size in GROUP_SIZES:
        runs = {method: results.finals(task, method, group_size=size) for method in ("full", "esft_token")}
        if not all(runs.values()):
            continue
        base = results.base(task, size)
        shares = [
            f"{100 * _share(base, runs['full'], runs['esft_token'], measure):.0f} %"
            for measure in (metric, general_loss)
        ]
        rows.append([f"{size}", "base", *_quality([base]), "", "", "", ""])
        rows.append(["", "full fine-tuning", *_quality(runs["full"]), "", "", "", str(len(runs["full"]))])
        esft = runs["esft_token"]
        rows.append(["", "ESFT-Token", *_quality(esft), _experts(esft[0]), *shares, str(len(esft))])
    header = [
        "group size",
        "method",
        *_quality_header(task),
        "experts per layer",
        *SHARES,
        "seeds",
    ]
    return markdown(header, rows) if rows else ""


def longer(results: Results, task: str) -> str:
    """Full fine-tuning and ESFT-Token with more steps; the learning rate is chosen again."""
    rows = []
    for steps in (results.steps, LONGER * results.steps):
        some = Results(results.store, steps)
        for method, p in [(name, p) for p in (None, MORE) for name in ("full", "full_gentle", *ESFT)]:
            records = some.finals(task, method, top_p=p)
            if records and some.finals(task, "full"):
                name = NAMES[method] if p is None else NAMES[method].replace("0.2", f"{p:g}")
                shares = ["", ""] if method == "full" else _shares(some, task, records)
                lr, seeds = f"{records[0]['lr']:g}", str(len(records))
                rows.append([str(steps), name, *_quality(records), *shares, lr, seeds])
    header = ["steps", "method", *_quality_header(task), *SHARES, "lr", "seeds"]
    return markdown(header, rows) if any(row[0] != str(results.steps) for row in rows) else ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _quality_header(task: str) -> list[str]:
    return [MEASURE[METRIC[task]], "loss", "general loss", "general tokens right, %"]


def _quality(records: Sequence[Record]) -> list[str]:
    measures = ((metric, 1), (task_loss, 3), (general_loss, 3), (general_right, 1))
    return [value(records, measure).text(digits) for measure, digits in measures]


def _experts(record: Record) -> str:
    experts = record["experts"]
    return f"{fmean(experts.values()):.1f}" if experts else ""


def _grid_cell(record: Record | None, chosen: bool) -> str:
    if record is None:
        return ""
    validation = record["validation"]["loss"]
    if validation is None:
        return "diverged"
    cell = f"{validation:.3f} · {metric(record):.1f} · {general_loss(record):.2f}"
    return f"**{cell}**" if chosen else cell
