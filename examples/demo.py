"""The main job on the embedded model, by the commands that a person would type.

Trains an adapter for each of two tasks, talks with both over one base through a pipe, measures them, and merges one.
Exits with 0 if what is promised holds: the adapters answer, the base does not and is unchanged, the files are small,
and the merged model answers as its adapter does.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import shutil
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from transformers.utils import logging

from peft_esft.cli.main import main as peft_esft


BASE = "examples/tiny_moe/model"
OUT = Path("demo_output")
SECTIONS = "examples/tiny_moe/tasks/sections.jsonl"
SETTINGS = "--no-gradient-checkpointing --max-length 128 --score-tokens 16384 --save-strategy no --logging-steps 20"
QUESTION, GREETING = "Do you sell maps?", "Dear customer, "
PARAGRAPH = "wait, waitpid, waitid - ожидает смену состояния процесса"
HEADING = "ИМЯ"
TYPED = "Do you sell maps?", "/base", "/again", "/adapter sections", PARAGRAPH
LAST_WORDS = (
    "You have seen two adapters of a few experts each, trained by one command apiece and switched over one base that "
    "stayed as it was, and one of them merged into an ordinary model.",
    "The commands take any mixture-of-experts model of transformers and any file of conversations, of prompts and "
    "completions, or of texts: docs/first_hour.md goes through them with forty rows.",
    "Go on with examples/recipes for a model on your GPU, docs/quickstart.md for the same in Python, and "
    "docs/choosing.md for which experts to train.",
)


class Tee(io.StringIO):
    """Keeps what is written, and shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = sys.stdout

    def write(self, text: str) -> int:
        self.shown.write(text)
        return super().write(text)


def run(command: str, typed: tuple[str, ...] = ()) -> str:
    """Runs a command of `peft-esft`, with lines that come through a pipe, and returns what it prints."""
    pipe = "".join(f"{line}\\n" for line in typed)
    print(f"\n$ {f'printf {shlex.quote(pipe)} | ' if typed else ''}peft-esft {command}", flush=True)
    sys.stdin, output = io.StringIO("".join(f"{line}\n" for line in typed)), Tee()
    with redirect_stdout(output):
        code = peft_esft(shlex.split(command))
    sys.stdin = sys.__stdin__
    if code:
        sys.exit(f"the command ended with {code}")
    return output.getvalue()


def file_hash(folder: str) -> str:
    """The hash of a model's weights on the disk."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def report(name: str) -> dict:
    """What `peft-esft train` has written of a run."""
    return json.loads((OUT / name / "train_report.json").read_text())


def shared_experts() -> int:
    """How many experts both adapters train."""
    first, second = (
        json.loads((OUT / name / "adapter_config.json").read_text())["target_experts"]
        for name in ("sections", "help_desk")
    )
    return sum(len(set(first[path]) & set(second.get(path, []))) for path in first)


def main() -> int:
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # on a model this small, threads mostly wait for each other
    shutil.rmtree(OUT, ignore_errors=True)
    before, started = file_hash(BASE), time.monotonic()

    print("1. Two tasks, two adapters: a paragraph of a Russian manual page to its heading, and a shop's help desk")
    run(
        f"train {BASE} {SECTIONS} --out {OUT}/sections --max-steps 60 "
        f"--learning-rate 1e-3 --per-device-train-batch-size 16 --per-device-eval-batch-size 50 {SETTINGS}"
    )
    run(
        f"train {BASE} examples/first_hour/help_desk.jsonl --out {OUT}/help_desk --max-steps 60 --learning-rate 3e-3 "
        f"{SETTINGS}"
    )

    print("\n2. Both on one base, switched in a conversation")
    answers = run(f"chat {BASE} {OUT}/help_desk {OUT}/sections --max-new-tokens 24", TYPED).splitlines()

    print("\n3. Base and adapters on the same rows")
    run(f"eval {BASE} {OUT}/sections {OUT}/help_desk {SECTIONS} --max-rows 32 --max-length 128")

    print("\n4. Merge one into an ordinary model")
    run(f"merge {BASE} {OUT}/help_desk {OUT}/merged")
    merged = run(f"chat {OUT}/merged --max-new-tokens 24", (QUESTION,)).splitlines()

    losses = {name: report(name)["held_out_loss"] for name in ("sections", "help_desk")}
    size = (OUT / "sections" / "adapter_model.safetensors").stat().st_size
    trained = report("sections")["trained_parameters"]
    checks = {
        "both adapters more than halve the loss on held-out rows": all(
            loss["after"] < loss["before"] / 2 for loss in losses.values()
        ),
        "the help desk's adapter answers in its words, the base does not": answers[0].startswith(GREETING)
        and not answers[1].startswith(GREETING),
        "the other adapter names the heading": answers[-1] == HEADING,
        "the merged model answers as its adapter does": merged == answers[:1],
        f"{shared_experts()} experts belong to both adapters": shared_experts() < 6,
        f"an adapter's file has the trained parameters and no more: {size / 1e6:.2f} MB": size <= 1.01 * 4 * trained,
        "the base's file is unchanged": file_hash(BASE) == before,
    }
    print()
    for check, holds in checks.items():
        print(f"  {'ok    ' if holds else 'FAILED'}  {check}")
    print(f"\n{time.monotonic() - started:.0f} seconds; everything is in {OUT}/")
    print("", *LAST_WORDS, sep="\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
