"""Writes the four small tasks and the general held-out set to `tasks/`, from the same text as the pretraining.

    python examples/tiny_moe/build_tasks.py --cache ~/.cache/peft_esft_tiny_moe

Evaluation examples come from documents that pretraining left out, training examples from the others.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from corpus import PRETRAINING_DOMAINS, is_held_out, load_domain


Example = tuple[str, str]  # prompt and completion
EXAMPLES = {"train": 1600, "eval": 200}
GENERAL_WINDOWS = 24
WINDOW_CHARACTERS = 700
RUSSIAN_SECTIONS = ("ИМЯ", "СИНТАКСИС", "ОПИСАНИЕ", "СТАНДАРТЫ", "ВОЗВРАЩАЕМОЕ ЗНАЧЕНИЕ", "ЗАМЕЧАНИЯ", "ОШИБКИ")
BOOKS = ("Psa", "Isa", "Ge", "Lev", "Prv", "Mat", "Rom", "Rev")


def signatures(text: str) -> Iterator[Example]:
    """A Python function's head to a JSON object of its name and arguments."""
    for line in re.findall(r"^ *(def \w+\(.{1,60}\):)$", text, flags=re.MULTILINE):
        try:
            function = ast.parse(line + " pass").body[0]
        except SyntaxError:
            continue
        assert isinstance(function, ast.FunctionDef)
        names = [argument.arg for argument in function.args.args]
        yield f"{line}\n", json.dumps({"name": function.name, "args": names})


def sections(text: str) -> Iterator[Example]:
    """A paragraph of a Russian manual page to the heading that it stands under."""
    for heading, body in re.findall(r"^([А-ЯЁ][А-ЯЁ ]+)\n((?:.+\n)+)", text, flags=re.MULTILINE):
        paragraph = " ".join(body.split())[:240]
        if heading in RUSSIAN_SECTIONS and len(paragraph) > 40:
            yield f"{paragraph}\n→ ", heading


def verses(text: str, book: str) -> Iterator[Example]:
    """A verse of the King James Bible to the book that it is from."""
    if book in BOOKS:
        for verse in text.splitlines():
            yield f"{verse[:240]}\n→ ", book


def french(text: str) -> Iterator[Example]:
    """French manual pages, to be continued: a language that the base has never seen."""
    text = text.partition("\nTRADUCTION\n")[0]  # who translated it: the same few names on every page
    for start in range(0, len(text) - 500, 1500):
        if "@" not in text[start : start + 500]:  # no addresses
            yield "", text[start : start + 500]


def write(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"{path.name}: {len(records)} records")


def build_task(name: str, documents: dict[str, str]) -> list[dict[str, str]]:
    records = []
    for split, wanted in EXAMPLES.items():
        examples: dict[Example, None] = {}
        for document, text in documents.items():
            if is_held_out(document) != (split == "eval"):
                continue
            if name == "verses":
                found = verses(text, re.sub(r"\d+$", "", document))
            else:
                found = {"signatures": signatures, "sections": sections, "french": french}[name](text)
            examples.update(dict.fromkeys(found))
        seen = {(record["prompt"], record["completion"]) for record in records}
        unique = [example for example in examples if example not in seen]
        random.Random(0).shuffle(unique)
        if name == "verses":
            unique = in_turns(unique)
        for prompt, completion in unique[:wanted]:
            records.append({"split": split, "prompt": prompt, "completion": completion})
    return records


def in_turns(examples: list[Example]) -> list[Example]:
    """The examples with the answers taking turns, so that a split's beginning has each equally often."""
    seen: Counter[str] = Counter()
    turns = []
    for place, (_, answer) in enumerate(examples):
        turns.append((seen[answer], place))
        seen[answer] += 1
    return [examples[place] for _, place in sorted(turns)]


def build_general(cache: Path) -> list[dict[str, str]]:
    records = []
    for domain in PRETRAINING_DOMAINS:
        held_out = [text for name, text in load_domain(domain, cache).items() if is_held_out(name)]
        windows = [
            text[start : start + WINDOW_CHARACTERS]
            for text in held_out
            for start in range(0, len(text) - WINDOW_CHARACTERS, 4 * WINDOW_CHARACTERS)
            if "@" not in text[start : start + WINDOW_CHARACTERS]  # no addresses
        ]
        for window in random.Random(0).sample(windows, GENERAL_WINDOWS):
            records.append({"domain": domain, "text": window})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    folder = Path(__file__).parent / "tasks"
    sources = {"signatures": "python", "sections": "russian", "verses": "scripture", "french": "french"}
    for name, domain in sources.items():
        write(folder / f"{name}.jsonl", build_task(name, load_domain(domain, arguments.cache)))
    write(folder / "general.jsonl", build_general(arguments.cache))


if __name__ == "__main__":
    main()
