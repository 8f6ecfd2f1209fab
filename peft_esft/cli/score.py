"""Defines `peft-esft score`, which measures the experts that a task uses."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .base_options import add_base_options


AVERAGING = ("sample", "token")
"""The values of `scoring.scores.Averaging`; named here too, so that `--help` need not load torch."""
DATA_HELP = "JSON Lines with text, messages or prompt+completion, from a .jsonl file or a pipe (-); or a text file"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("score", help="measure which experts a task uses (forward passes only)")
    parser.set_defaults(run=run, kinds={"model": ("model",)})
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("model", help="folder or Hub name of the model")
    add("--data", type=Path, required=True, help=DATA_HELP)
    add("--out", type=Path, required=True, help="file for the scores (JSON)")
    add("--max-tokens", type=_at_least_1, default=131_072, help=f"stop after so many tokens {shown}")
    add("--max-length", type=_at_least_1, default=4096, help=f"cut samples to so many tokens {shown}")
    add("--batch-size", type=_at_least_1, default=8, help=f"samples in a batch {shown}")
    add("--answers-only", action="store_true", help="count only tokens that predict completions or marked answers")
    add("--averaging", choices=AVERAGING, default="sample", help="mean over samples, or over tokens")
    add_base_options(parser)


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Scores a model and writes the scores to a file."""
    from ..scoring.batches import text_batches
    from ..scoring.measure import score_experts
    from .loading import load_base, load_tokenizer
    from .sample_files import SampleFile

    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ValueError(f"--out is {options.out}; it is a file for the scores, in a folder that exists")
    samples = SampleFile(options.data)
    tokenizer = load_tokenizer(options.model)
    model = load_base(options)
    settings = {name: getattr(options, name) for name in ("batch_size", "max_length", "answers_only")}
    batches = text_batches(samples, tokenizer, **settings)
    scores = score_experts(
        model,
        samples.located(batches),
        max_tokens=options.max_tokens,
        averaging=options.averaging,
        answers_only=options.answers_only,
        progress=sys.stderr.isatty(),
    )
    scores.save(options.out)
    record = {
        "out": str(options.out),
        "model": scores.model,
        "containers": len(scores.containers),
        "num_tokens": scores.num_tokens,
        "num_samples": scores.num_samples,
    }
    return record, f"{scores}\nwritten to {options.out}; next: peft-esft select {options.out} --preview"


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
