"""Tasks that continue plain text of a domain that the base has seen: the paper's model enhancement, without a format
to learn. Their text is that of the embedded model's tasks."""

from __future__ import annotations

import tasks


CONTINUED = {"scripture": "verses", "russian": "sections"}  # text task: where its text is from
ALL = (*tasks.TASKS, *CONTINUED)
ASKED = ":\n→ ", "\n→ "  # what follows the text in a prompt


def load(task: str, split: str) -> list[tuple[str, str]]:
    """The (prompt, completion) pairs of any task; those of plain text have an empty prompt."""
    if task not in CONTINUED:
        return tasks.load_task(task, split)
    return [("", _text(prompt)) for prompt, _ in tasks.load_task(CONTINUED[task], split)]


def _text(prompt: str) -> str:
    for asked in ASKED:
        prompt = prompt.removesuffix(asked)
    return prompt
