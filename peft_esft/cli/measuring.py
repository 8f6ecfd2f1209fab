"""Measures a base and its adapters, one after the other on one copy of the base, for `peft-esft eval`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..analysis.evaluation import Evaluation, evaluate
from ..analysis.evaluation_page import BASE, write_evaluation_page
from ..analysis.forgetting import ForgettingPoint, forgetting
from ..scoring.batches import RowError, text_batches
from .kinds import TRAIN_REPORT
from .loading import load_base, load_tokenizer, names_of
from .training_rows import Format, check_chat_template, read_measured_rows


@dataclass
class Rows:
    """Rows to measure on.

    Attributes:
        name: the file's name without its ending.
        rows: the rows, a `datasets.Dataset`.
        format: what a row is.
        origin: where they are from, in words.
        answers_only: True if the loss is that of the answers.
    """

    name: str
    rows: Any
    format: Format
    origin: str
    answers_only: bool = False


@dataclass
class Measuring:
    """What is measured, and the results by name of the model.

    Attributes:
        options: of the command.
        adapters: folders by name.
        tokenizer: makes tokens of rows.
        base: the base model.
        task: the rows of DATA; None if only lm-eval is asked.
        general: the general texts.
        measured: loss and answers, by name of the model.
        forgotten: the measurements on general text, by name of the adapter and of the text.
        harness: lm-eval's results, by name of the model, task and metric.
    """

    options: argparse.Namespace
    adapters: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    base: Any
    task: Rows | None
    general: list[Rows]
    measured: dict[str, Evaluation] = field(default_factory=dict)
    forgotten: dict[str, dict[str, ForgettingPoint]] = field(default_factory=dict)
    harness: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def prepare(cls, options: argparse.Namespace, adapters: Sequence[str], data: str | None) -> Measuring:
        """Reads the rows, then loads the model.

        Raises:
            ValueError: if rows are malformed or need a chat template that is not there.
        """
        if not sys.stderr.isatty():
            disable_progress_bars()
            logging.disable_progress_bar()
        names = names_of(adapters)
        if BASE in names:
            raise ValueError(f"an adapter is called {BASE!r}, as the model itself is in the table; NAME=FOLDER")
        task = None if data is None else _task_rows(options, data, list(names.values()))
        general = general_rows(options.general, options.max_rows)
        tokenizer = load_tokenizer(options.model, list(names.values()))
        if task is not None:
            decide_answers(task, tokenizer)
        base = load_base(options)
        return cls(options, names, tokenizer, base, task, general)

    def run(self) -> dict[str, Any]:
        """Measures the base and each adapter.

        Returns:
            The results, for `--json`.
        """
        self._measure(BASE, self.base)
        if not self.adapters and self.task is not None:
            for rows in self.general:
                batches = self._batches(rows, f"base on {rows.name}")
                loss = evaluate(self.base, batches)
                point = ForgettingPoint(loss.num_tokens, loss.loss, loss.loss, 0.0, 1.0)
                self.forgotten.setdefault(BASE, {})[rows.name] = point
        for name, folder in self.adapters.items():
            model = PeftModel.from_pretrained(self.base, folder).eval()
            self._measure(name, model)
            if self.general:
                texts = {rows.name: self._batches(rows, f"{name} on {rows.name}") for rows in self.general}
                self.forgotten[name] = forgetting(model, texts).points
            self.base = model.unload()
        return self._record()

    def _measure(self, name: str, model: Any) -> None:
        if self.task is not None:
            self.measured[name] = evaluate(model, self._batches(self.task, f"{name} on {self.task.name}"))
        if self.options.tasks:
            self.harness[name] = _ask_lm_eval(model, self.tokenizer, self.options)

    def _batches(self, rows: Rows, label: str) -> Iterator[dict[str, Any]]:
        return batches_of(rows, self.tokenizer, label, self.options.batch_size, self.options.max_length)

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"model": self.options.model}
        if self.task is not None:
            record |= {
                "data": self.task.name,
                "rows": len(self.task.rows),
                "rows_from": self.task.origin,
                "format": self.task.format,
                "loss_of": "answers" if self.task.answers_only else "whole rows",
            }
        record["models"] = {
            name: {
                "folder": self.adapters.get(name, self.options.model),
                **(asdict(self.measured[name]) if name in self.measured else {}),
                "general": {text: _general_record(point) for text, point in self.forgotten.get(name, {}).items()},
                "tasks": self.harness.get(name, {}),
            }
            for name in (BASE, *self.adapters)
        }
        for text, point in next(iter(self.forgotten.values()), {}).items():
            record["models"][BASE]["general"][text] = {"loss": point.loss_before, "num_tokens": point.num_tokens}
        for model in record["models"].values():
            if self.task is not None and not self.task.answers_only:
                model["exact_match"] = None  # a whole text is not an answer
        return record

    def table(self) -> list[list[str]]:
        """The results as rows of a table, the first with the names of the columns."""
        texts = [rows.name for rows in self.general]
        header = ["model"]
        if self.task is not None:
            header += ["loss", *(["exact match"] if self.task.answers_only else []), "tokens right"]
        for text in texts:
            header += [f"loss on {text}", "change", "KL to the base", "same top token"]
        tasks = {f"{task} {metric}" for result in self.harness.values() for task in result for metric in result[task]}
        header += sorted(tasks)
        rows = [header]
        for name in (BASE, *self.adapters):
            row = [name]
            if self.task is not None:
                own = self.measured[name]
                exact = [f"{own.exact_match:.1%}"] if self.task.answers_only else []
                row += [f"{own.loss:.3f}", *exact, f"{own.token_accuracy:.1%}"]
            for text in texts:
                row += self._forgotten_cells(name, text)
            found = {
                f"{task} {key}": value
                for task, own in self.harness.get(name, {}).items()
                for key, value in own.items()
            }
            rows.append([*row, *(f"{found[column]:.4g}" if column in found else "-" for column in sorted(tasks))])
        return rows

    def _forgotten_cells(self, name: str, text: str) -> list[str]:
        if name == BASE:
            before = next(iter(self.forgotten.values()))[text].loss_before
            return [f"{before:.3f}", "", "", ""]
        point = self.forgotten[name][text]
        return [f"{point.loss_after:.3f}", f"{point.loss_change:+.3f}", f"{point.kl:.4f}", f"{point.same_top:.1%}"]

    def describe(self) -> str:
        """Writes the results out as text."""
        lines = []
        if self.task is not None:
            of = "answers" if self.task.answers_only else "whole rows"
            tokens = self.measured[BASE].num_tokens
            lines.append(
                f"{len(self.task.rows):,} rows of {self.task.format} of {self.task.name} ({self.task.origin}); "
                f"loss of {of}, {tokens:,} tokens"
            )
        return "\n".join([*lines, aligned(self.table())])

    def write_page(self, out: Path) -> None:
        """Writes the table and figures as a page."""
        if self.task is not None:
            losses = {
                name: {text: (point.loss_before, point.loss_after) for text, point in points.items()}
                for name, points in self.forgotten.items()
                if name != BASE
            }
            write_evaluation_page(
                out,
                self.task.name,
                self.measured,
                losses,
                [[cell or "–" for cell in row] for row in self.table()],
                has_answers=self.task.answers_only,
            )


def batches_of(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, label: str, batch_size: int, max_length: int
) -> Iterator[dict[str, Any]]:
    """Makes batches of rows, as they are asked for.

    Raises:
        ValueError: if a row is malformed, with its number.
    """
    number = 0

    def numbered() -> Iterator[dict[str, Any]]:
        nonlocal number
        for row in tqdm(rows.rows, label, unit=" rows", disable=not sys.stderr.isatty(), leave=False):
            number += 1
            yield row

    sizes = {"batch_size": batch_size, "max_length": max_length}
    try:
        yield from text_batches(numbered(), tokenizer, answers_only=rows.answers_only, **sizes)
    except RowError as error:
        raise ValueError(f"row {number} of {rows.name}: {error}") from error


def aligned(table: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def _general_record(point: ForgettingPoint) -> dict[str, float]:
    return {
        "loss": point.loss_after,
        "loss_change": point.loss_change,
        "kl": point.kl,
        "same_top": point.same_top,
        "num_tokens": point.num_tokens,
    }


def _task_rows(options: argparse.Namespace, data: str, folders: Sequence[str]) -> Rows:
    seed = next((seed for folder in folders if (seed := _seed_of_training(Path(folder), data)) is not None), None)
    rows, form, origin = read_measured_rows(data, columns=options.columns, split=options.split, seed=seed)
    return _cut(Rows(name_of(data), rows, form, origin), options.max_rows)


def general_rows(texts: Sequence[str], max_rows: int) -> list[Rows]:
    """Reads general texts, the first rows of each.

    Raises:
        ValueError: if one cannot be read, or two have one name.
    """
    general = []
    for text in texts:
        rows, form, origin = read_measured_rows(text)
        general.append(_cut(Rows(name_of(text), rows, form, origin), max_rows))
    names = [rows.name for rows in general]
    if doubles := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two general texts are called {doubles[0]!r}; rename one of the files")
    return general


def name_of(data: str) -> str:
    """The name of a file without its endings, or the name of a dataset."""
    return Path(data).name.partition(".")[0] or data


def _cut(rows: Rows, most: int) -> Rows:
    if len(rows.rows) > most:
        rows.origin += f", the first {most:,} of {len(rows.rows):,}"
        rows.rows = rows.rows.select(range(most))
    return rows


def _seed_of_training(folder: Path, data: str) -> int | None:
    """The seed with which `peft-esft train` held rows out of the same data; None if it did not."""
    try:
        report: Mapping[str, Any] = json.loads((folder / TRAIN_REPORT).read_text(encoding="utf-8"))
        is_same = Path(str(report["data"])).resolve() == Path(data).resolve() or report["data"] == data
        return int(report.get("seed", 42)) if is_same and "at random" in report["held_out_from"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def decide_answers(task: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Takes the loss on answers where rows have some and the chat template marks them, as `train` does."""
    check_chat_template(task.rows, tokenizer)
    task.answers_only = task.format == "prompt and completion"
    if task.format == "messages":
        template = _training_template(tokenizer)
        task.answers_only = template is not None
        tokenizer.chat_template = template or tokenizer.chat_template


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template with marks around the answers: the tokenizer's own, or TRL's for it; None if there is none."""
    if "{% generation %}" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
        return str(tokenizer.chat_template)
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer)
    except (ImportError, ValueError):
        return None


def _ask_lm_eval(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The metrics of lm-eval's tasks for a model that is loaded, by task and metric."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=options.include_path)
    if missing := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"lm-eval has no task {missing[0]!r}; `lm-eval ls tasks` lists them")
    with redirect_stdout(sys.stderr):
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=names,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
            verbosity="ERROR",
        )
    return {
        task: {key.partition(",")[0]: value for key, value in metrics.items() if _is_metric(key, value)}
        for task, metrics in found["results"].items()
    }


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "stderr" not in key and isinstance(value, int | float)
