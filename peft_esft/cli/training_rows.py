"""Reads the rows that a model is trained on: files, folders and dataset names, through `datasets`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from .sample_files import STANDARD_INPUT


Format = Literal["messages", "prompt and completion", "text"]
"""What a row is: a conversation, a prompt with its answer, or a text."""

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
HELD_OUT_NAMES = ("eval", "validation", "test", "dev", "held_out")
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 500
NEEDED = "a row has messages, or prompt and completion, or text"


@dataclass
class TrainingRows:
    """The rows of a training run.

    Attributes:
        train: a `datasets.Dataset`.
        held_out: a `datasets.Dataset`, of which the loss is measured before and after.
        format: what a row is.
        origin: where the held-out rows are from, in words.
    """

    train: Any
    held_out: Any
    format: Format
    origin: str


def read_rows(
    data: str,
    held_out: str | None = None,
    *,
    columns: Sequence[str] = (),
    config: str | None = None,
    split: str = "train",
    seed: int = 42,
) -> TrainingRows:
    """Reads the rows to train on and those to measure on.

    If no held-out rows are given, they are a split of the dataset that is named like one, the rows that a column
    `split` says so of, or a tenth of the rows, 500 at most.

    Args:
        data: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`, also packed, `.gz` for example), a folder
            of such files or one that `Dataset.save_to_disk` wrote, the name of a dataset on the Hub, or "-" for JSON
            Lines from the standard input.
        held_out: the same, for the held-out rows.
        columns: what columns hold, each as "KIND=COLUMN"; the kinds are messages, prompt, completion and text.
        config: the configuration of a dataset on the Hub.
        split: of a dataset that has several, the one to train on.
        seed: of the split that is made.

    Returns:
        The rows, with the columns that are needed alone.

    Raises:
        ValueError: if there is nothing to read, it is malformed, or rows are of none of the formats.
    """
    named = _parse_columns(columns)
    splits = _load(data, config)
    train = _pick(splits, split, data)
    kept, form = _with_columns(train, named, data)
    if held_out is not None:
        other = _load(held_out, None)
        name = next((name for name in (*HELD_OUT_NAMES, "train", split) if name in other), "train")
        evaluation, _ = _with_columns(_pick(other, name, held_out), named, held_out, form)
        return TrainingRows(kept, evaluation, form, held_out)
    for name in HELD_OUT_NAMES:
        if name in splits:
            evaluation, _ = _with_columns(splits[name], named, data, form)
            return TrainingRows(kept, evaluation, form, f"its split {name!r}")
    if numbers := _by_column(train):
        return TrainingRows(kept.select(numbers[0]), kept.select(numbers[1]), form, "its column 'split'")
    return _split(kept, form, seed, data)


def read_measured_rows(
    data: str,
    *,
    columns: Sequence[str] = (),
    split: str | None = None,
    seed: int | None = None,
) -> tuple[Any, Format, str]:
    """Reads the rows to measure a model on.

    They are those of a split that is named like a held-out one, or that a column `split` says so of; otherwise all.

    Args:
        data: as in `read_rows`.
        columns: as in `read_rows`.
        split: the split to take instead.
        seed: of a training on `data`; takes the rows that `read_rows` held out with it, where the data has no split.

    Returns:
        The rows, what a row is, and where the rows are from, in words.

    Raises:
        ValueError: if there is nothing to read, it is malformed, or rows are of none of the formats.
    """
    named = _parse_columns(columns)
    splits = _load(data, None)
    if split is not None:
        rows, form = _with_columns(_of_split(splits, split, data), named, data)
        return rows, form, f"its split {split!r}"
    name = next((name for name in (*HELD_OUT_NAMES, "train") if name in splits), "train")
    picked = _pick(splits, name, data)
    rows, form = _with_columns(picked, named, data)
    if name == "train":
        if numbers := _by_column(picked):
            return rows.select(numbers[1]), form, "the held-out ones by its column 'split'"
        if seed is not None:
            return _split(rows, form, seed, data).held_out, form, "those that training held out"
        return rows, form, "all of it"
    return rows, form, f"its split {name!r}"


def check_chat_template(rows: Any, tokenizer: Any, *ways: str) -> None:
    """Checks that conversations can be made into text.

    Args:
        rows: a `datasets.Dataset`.
        tokenizer: of the model.
        *ways: what else the command takes instead, for the message.

    Raises:
        ValueError: if the rows are conversations and the tokenizer has no chat template.
    """
    if _is_conversation(rows[0][rows.column_names[0]]) and tokenizer.chat_template is None:
        raise ValueError(
            f"the rows are conversations, and the tokenizer of {tokenizer.name_or_path} has no chat template: it is a "
            f"base model. Take {', '.join(['the -Instruct or -Chat one', *ways])}, or rows of prompt and completion"
        )


def _of_split(splits: Mapping[str, Any], name: str, data: str) -> Any:
    """The rows of a split, or those that a column `split` says so of."""
    only = next(iter(splits.values())) if len(splits) == 1 else None
    if only is not None and "split" in only.column_names:
        numbers = [number for number, own in enumerate(only["split"]) if own == name]
        found, names = only.select(numbers), only.unique("split")
    else:
        found, names = splits.get(name), list(splits)
    if not found:
        raise ValueError(f"{data} has no rows of a split {name!r}; it has {', '.join(map(str, names))}")
    return found


def _by_column(rows: Any) -> tuple[list[int], list[int]] | None:
    """The numbers of the rows to train on and of those held out, as a column `split` says; None if it does not."""
    if "split" not in rows.column_names or not set(rows.unique("split")) <= {"train", *HELD_OUT_NAMES}:
        return None
    is_train = [value == "train" for value in rows["split"]]
    if all(is_train) or not any(is_train):
        return None
    train, held_out = ([i for i, own in enumerate(is_train) if own is wanted] for wanted in (True, False))
    return train, held_out


def _split(rows: Any, form: Format, seed: int, data: str) -> TrainingRows:
    if len(rows) < 2:
        raise ValueError(f"{data} has {len(rows)} row; two are needed at least, one to train on and one held out")
    number = max(1, min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(rows))))
    parts = rows.train_test_split(test_size=number, seed=seed)
    return TrainingRows(parts["train"], parts["test"], form, "taken out of it at random")


def _load(data: str, config: str | None) -> Mapping[str, Any]:
    """The splits of a dataset."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    if data == STANDARD_INPUT:
        return {"train": _rows_of_standard_input()}
    path = Path(data)
    if config is not None and path.exists():
        raise ValueError(f"--dataset-config is for a dataset on the Hub, and {data} is a file or folder; leave it out")
    try:
        if path.is_file():
            settings = {"sep": "\t"} if ".tsv" in path.suffixes else {}
            return load_dataset(_builder_of(path), data_files={"train": str(path)}, **settings)
        if path.is_dir():
            if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
                found = load_from_disk(str(path))
                return found if isinstance(found, DatasetDict) else {"train": found}
            return load_dataset(str(path))
    except (ValueError, OSError) as error:
        if "corresponds to no data" in str(error):  # of a file with blank lines alone
            raise ValueError(f"{data} has no rows") from error
        if data in str(error):
            raise
        raise ValueError(f"{data} cannot be read: {_first_line(error)}") from error
    except Exception as error:  # `datasets` wraps what its readers raise in errors of its own
        raise ValueError(f"{data} cannot be read: {_first_line(error)}") from error
    if path.suffix.lower() in BUILDERS or data.count("/") > 1 or data.startswith((".", "/", "~")):
        raise ValueError(f"there is no file or folder {data!r}")
    try:
        return load_dataset(data, config)
    except Exception as error:  # the Hub's, and those of a dataset's own files
        reason = _first_line(error)
        raise ValueError(f"{data!r} is not a file or folder, and cannot be read as a dataset: {reason}") from error


@cache
def _rows_of_standard_input() -> Any:
    """The rows of the standard input, JSON Lines. It can be read once, and is kept for whatever reads it again."""
    from datasets import Dataset

    rows = []
    for number, line in enumerate(sys.stdin, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of the standard input is not JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} of the standard input is not a JSON object; {NEEDED}")
    if not rows:
        raise ValueError("the standard input is empty; pipe rows into it, one JSON object in each line")
    return Dataset.from_list(rows)


def _builder_of(path: Path) -> str:
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in (".gz", ".xz", ".bz2", ".zst"):
        endings.pop()
    builder = BUILDERS.get(endings[-1]) if endings else None
    if builder is None:
        raise ValueError(f"{path} is not one of {', '.join(BUILDERS)}; its format is not known")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return builder


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


def _pick(splits: Mapping[str, Any], name: str, data: str) -> Any:
    if name == "train" and name not in splits and len(splits) == 1:
        name = next(iter(splits))  # "train" is what is asked for by default
    if name not in splits:
        known = ", ".join(splits)
        raise ValueError(
            f"{data} has no split {name!r}; it has {known}. Name one: --dataset-train-split, eval's --split"
        )
    if len(splits[name]) == 0:
        raise ValueError(f"{data} has no rows")
    return splits[name]


def _parse_columns(columns: Sequence[str]) -> dict[str, str]:
    kinds = [name for names in COLUMNS.values() for name in names]
    named = {}
    for text in columns:
        kind, sign, column = text.partition("=")
        if not sign or not column or kind not in kinds:
            raise ValueError(f"--columns has {text!r}; expected KIND=COLUMN, where KIND is one of {', '.join(kinds)}")
        named[kind] = column
    return named


def _with_columns(rows: Any, named: Mapping[str, str], data: str, wanted: Format | None = None) -> tuple[Any, Format]:
    """Renames columns, finds out what a row is, and drops the other columns."""
    present = list(rows.column_names)
    if missing := [column for column in named.values() if column not in present]:
        raise ValueError(f"{data} has no column {missing[0]!r}; it has {', '.join(present)}")
    for kind, column in named.items():
        if kind != column:
            rows = rows.remove_columns(kind) if kind in rows.column_names else rows
            rows = rows.rename_column(column, kind)
    candidates = [form for form in get_args(Format) if set(COLUMNS[form]) <= set(rows.column_names)]
    if named:
        candidates = [form for form in candidates if set(named) <= set(COLUMNS[form])]
    if wanted is not None and wanted not in candidates:
        raise ValueError(f"{data} has {', '.join(present)}; the rows to train on have {wanted}")
    if not candidates:
        raise ValueError(f"{data} has {', '.join(present)}; {NEEDED}. Name the columns: --columns prompt=COLUMN ...")
    form = wanted or candidates[0]
    rows = rows.select_columns([*COLUMNS[form], *(["tools"] if "tools" in rows.column_names else [])])
    _check(rows, form, data)
    return rows, form


def _check(rows: Any, form: Format, data: str) -> None:
    """Refuses a row that is not what the others are, by its number."""
    expected = "a list of {role, content}" if form == "messages" else "a text"
    for name in COLUMNS[form]:
        try:
            values = list(rows[name])
        except UnicodeDecodeError as error:  # texts are decoded only here
            raise ValueError(f"{data} is not UTF-8 text: {error}") from error
        for number, value in enumerate(values, start=1):
            is_right = (form != "messages" and isinstance(value, str)) or (form != "text" and _is_conversation(value))
            if not is_right:
                shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
                raise ValueError(f"row {number} of {data}: {name} is {shown}; expected {expected}")


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in value)
    )
