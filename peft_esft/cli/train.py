"""Defines `peft-esft train`, which scores, selects, trains, measures and saves in one command."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any


OWN = {
    "--eval": ("DATA", "held-out rows; a tenth of DATA is held out if it has none"),
    "--columns": ("KIND=COLUMN", "what columns hold: messages=, prompt= and completion=, or text="),
    "--experts": ("FILE", "scores of `peft-esft score` to choose by; the training data is scored without it"),
    "--metric": ("NAME", "which score chooses: token, gate or gate_share (default: token)"),
    "--top-p": ("P", "share of the choices to cover in each layer (default: 0.2, for gate 0.1)"),
    "--budget": ("SHARE", "share of all experts to train, or memory of a GPU to fill: 24GB; instead of --top-p"),
    "--score-tokens": ("N", "tokens to score (default: 131072)"),
    "--rank": ("R", "rank of the trained changes (default: full rank)"),
    "--bits": ("N", "store the frozen experts in so many bits"),
    "--model-revision": ("NAME", "revision of a model on the Hub"),
    "--attn-implementation": ("NAME", "attention implementation, as transformers names them"),
    "--dataset-config": ("NAME", "configuration of a dataset on the Hub"),
    "--dataset-train-split": ("NAME", "the split to train on (default: train)"),
    "--config": ("FILE", "a recipe: these options, and TRL's, as YAML"),
}
TRL = {
    "--learning-rate": ("X", "(default: 1e-5, the paper's for 16 B parameters)"),
    "--num-train-epochs": ("X", "(default: 3)"),
    "--max-steps": ("N", "instead of epochs"),
    "--per-device-train-batch-size": ("N", "(default: 8)"),
    "--gradient-accumulation-steps": ("N", "(default: 1)"),
    "--max-length": ("N", "cut rows to so many tokens (default: 1024)"),
    "--lr-scheduler-type": ("NAME", "(default: linear)"),
    "--save-steps": ("N", "a checkpoint each so many steps (default: 500)"),
    "--report-to": ("NAME", "a tracker: tensorboard, wandb, trackio, ... (default: none)"),
    "--chat-template-path": ("FILE", "a .jinja file, or a model whose chat template to take"),
    "--bf16": ("BOOL", "mixed precision in bf16 (default: true where the GPU has it)"),
    "--dtype": ("NAME", "dtype to load the model in (default: bfloat16 with --bf16, else float32)"),
}
TRL_FLAGS = {
    "--packing": "put several rows in one sequence",
    "--assistant-only-loss": "loss on answers (default: if the chat template marks them)",
    "--no-gradient-checkpointing": "keep activations: faster, more memory",
}
SEVERAL = ("--columns", "--general", "--top-ps", "--ways")
USAGE = "peft-esft train MODEL DATA --out FOLDER [options]"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train",
        help="score, select, train and save in one command",
        usage=USAGE,
        description="Finds the experts that DATA uses, trains them with TRL's SFTTrainer, and measures the loss on "
        "held-out rows before and after. Several GPUs: accelerate launch -m peft_esft train ...",
        epilog="Every other field of TRL's SFTConfig is an option too, for example --warmup-steps 100.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or Hub name of the model")
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help="file, folder, dataset or pipe (-) of messages, prompt+completion or text",
    )
    add("--out", metavar="FOLDER", help="new folder for scores, adapter, card, tokenizer and report")
    add("--dry-run", action="store_true", help="say what would be trained, and stop")
    add("--resume", action="store_true", help="go on from the last checkpoint in FOLDER")
    add_training_options(parser, OWN)


def add_training_options(parser: argparse.ArgumentParser, own: Mapping[str, tuple[str, str]]) -> None:
    """Adds options of training for `--help`; what is given goes to `train_options.parse` as it is.

    Args:
        parser: of the command.
        own: the options that are not TRL's: what stands for the value, and the text. Lists are those named in SEVERAL.
    """
    for name, (shown, text) in own.items():
        parser.add_argument(name, metavar=shown, help=text, nargs="+" if name in SEVERAL else None)
    group = parser.add_argument_group("options of TRL and transformers, under their names")
    for name, (shown, text) in TRL.items():
        group.add_argument(name, metavar=shown, help=text)
    for name, text in TRL_FLAGS.items():
        group.add_argument(name, nargs="?", const="true", metavar="BOOL", help=text)
    _keep_arguments(parser)


def _keep_arguments(parser: argparse.ArgumentParser) -> None:
    """Makes the parser hand its arguments on as they are, so that TRL's parser reads them when the command runs.

    TRL alone knows all fields of `SFTConfig`, and loading it takes seconds, which `--help` should not.
    """
    parse = parser.parse_known_args

    def keep(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, _ = parse(args, namespace)
        options.arguments = [argument for argument in args or () if argument != "--json"]
        return options, []

    parser.parse_known_args = keep  # type: ignore[method-assign, assignment]


def check_libraries(command: str) -> None:
    """Raises ImportError if a library that training needs is not installed."""
    if missing := [name for name in ("trl", "datasets", "accelerate") if find_spec(name) is None]:
        raise ImportError(f"peft-esft {command} needs {', '.join(missing)}: pip install '.[train]' in a clone")


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Trains, or says what would be trained."""
    check_libraries("train")
    from .finetune import Finetuning, describe
    from .resuming import check_same_options, note_options
    from .train_options import TrainOptions, parse

    own, settings = parse(TrainOptions, options.arguments)
    if own.resume:
        check_same_options(own, settings)
    is_first = settings.process_index == 0
    if not is_first:
        warnings.simplefilter("ignore")  # the first process has the same ones
    try:
        with redirect_stdout(sys.stderr):  # the libraries' logs; what is asked for goes to the standard output
            tuning = Finetuning.prepare(own, settings)
            plan = tuning.plan()
            if not own.dry_run:
                if is_first:
                    print(describe(plan), flush=True)
                    note_options(own, settings)
                report = tuning.run()
    except KeyboardInterrupt as stopped:
        if is_first and stopped.args:
            print(f"peft-esft: {stopped}; go on with the same command and --resume", file=sys.stderr)
        raise
    finally:
        if is_first:
            _remove_empty(Path(settings.output_dir))
    if own.dry_run:
        return _of_first(is_first, plan, describe(plan))
    loss = report["held_out_loss"]
    rows = report["held_out_rows"]
    text = (
        f"loss on {rows:,} held-out rows: {loss['before']:.3f} before, {loss['after']:.3f} after\n"
        f"written to {settings.output_dir}; next: peft-esft chat {own.model_name_or_path} {settings.output_dir}"
    )
    return _of_first(is_first, report, text)


def _remove_empty(folder: Path) -> None:
    """Removes the folder that transformers' `Trainer` makes when it is built, unless it holds something."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _of_first(is_first: bool, record: Any, text: str) -> tuple[Any, str]:
    """Ends every process but the first here: the result is printed once."""
    if not is_first:
        raise SystemExit(0)
    return record, text
