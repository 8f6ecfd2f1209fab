"""The cells of the comparison, an embedded base and a task each, and their data."""

from __future__ import annotations

from typing import NamedTuple

import continued


Example = tuple[str, str]  # prompt and completion

BASES = ("deepseek", "olmoe")
PLAIN = ("scripture", "russian", "french", "heads")  # plain text: the completion is the whole row
ANSWERS = ("verses", "sections", "signatures")  # a prompt and a short answer
OWN = {
    "scripture": "scripture", "verses": "scripture", "russian": "russian", "sections": "russian",
    "heads": "python", "signatures": "python", "french": None,
}  # fmt: skip  # domain of the general text that the task is from
BATCH = {"russian": 8, "french": 8, "sections": 8, "scripture": 16, "heads": 16, "verses": 16, "signatures": 16}
VALIDATION = 100  # first examples of the training split
EVALUATION = {"french": 100}  # examples of the eval split, all 200 of the others


class Cell(NamedTuple):
    """A base and a task that it is trained on."""

    base: str
    task: str


CELLS = tuple(Cell(base, task) for base in BASES for task in (*PLAIN, *ANSWERS))
SEEN = frozenset(Cell("olmoe", task) for task in ("scripture", "russian", "verses", "sections", "signatures"))
"""The cells on which the hypotheses were found. The tests of the protocol leave them out."""
FRESH = tuple(cell for cell in CELLS if cell not in SEEN)


def load(task: str, split: str) -> list[Example]:
    """The examples of a task; split is "train", "validation" or "eval".

    `heads` continues the plain text of the Python function heads that `signatures` asks about.
    """
    source = "eval" if split == "eval" else "train"
    if task == "heads":
        examples = [("", prompt) for prompt, _ in continued.load("signatures", source)]
    else:
        examples = continued.load(task, source)
    if split == "eval":
        return examples[: EVALUATION.get(task)]
    return examples[:VALIDATION] if split == "validation" else examples[VALIDATION:]


def general_text(windows: dict[str, list[str]], task: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Divides the windows of general text by domain, so that no text is used for both purposes.

    Returns:
        What measures forgetting: the first half of each domain's windows, of the domains that the task is not from.
        What `contrast` subtracts: the second half of every second of these domains. It never sees the others.
    """
    domains = [name for name in sorted(windows) if name != OWN[task]]
    measured = {name: windows[name][: len(windows[name]) // 2] for name in domains}
    subtracted = {name: windows[name][len(windows[name]) // 2 :] for name in domains[::2]}
    return measured, subtracted
