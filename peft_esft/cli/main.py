"""`peft-esft`, the command line: thin over the library."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from peft.utils import CONFIG_NAME
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..interchange.adapter import AdapterFolder, read_config
from ..interchange.base import empty_model
from ..moe.containers import find_experts
from ..scoring.batches import text_batches
from ..scoring.measure import score_experts
from ..scoring.memory_estimate import ModelSizes, Setup, format_plan, plan, recommended
from ..scoring.preview import format_previews, preview_selections
from ..scoring.scores import ExpertScores, Metric
from ..scoring.selection import select_experts
from ..tuner.config import ESFTConfig
from ..tuner.model_card import describe_choice, describe_storage, num_experts_of, revision_of
from .conversion import add_commands
from .sample_files import SampleFile


BAR_WIDTH = 32
DTYPES = ["auto", "float32", "bfloat16", "float16", "float64"]
SHOWN = 16  # ids in a line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 if it worked, 1 if it was refused with a message. Wrong usage exits with 2.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], tuple[Any, str]] = options.command
    try:
        record, text = command(options)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        print(f"peft-esft: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record, indent=1) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-esft",
        description="Expert-Specialized Fine-Tuning: find out which experts of a model a task uses.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    added = [add(commands) for add in (_add_score, _add_select, _add_inspect, _add_report, _add_plan)]
    for command in (*added, *add_commands(commands)):
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def _add_score(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "score", help="measure which experts a task uses (forward passes only)"
    )
    parser.set_defaults(command=_score)
    parser.add_argument("model", help="folder or Hub name of the model")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help=".jsonl with text or messages in each line, or a text file, a sample a line",
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the scores (JSON)")
    parser.add_argument(
        "--max-tokens", type=_at_least_1, default=131_072, help="stop after so many tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=_at_least_1, default=4096, help="cut samples to so many tokens (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=_at_least_1, default=8, help="samples in a batch (default: %(default)s)")
    parser.add_argument(
        "--averaging", choices=["sample", "token"], default="sample", help="mean over samples, or over tokens"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype to load the model in; score in the one you train in"
    )
    parser.add_argument("--device-map", help="passed to transformers, for example auto")
    return parser


def _add_select(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("select", help="choose experts from scores")
    parser.set_defaults(command=_select)
    parser.add_argument("scores", type=Path, help="file written by `peft-esft score`")
    parser.add_argument(
        "--metric", choices=get_args(Metric), default="token", help="which score (default: %(default)s)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--top-p", type=float, help="share to cover in each layer (default: 0.2, for gate 0.1)")
    how.add_argument("--top-k", type=int, help="the same number of experts in every layer")
    how.add_argument("--budget", type=float, help="share of all experts' parameters, spread by score")
    how.add_argument("--preview", action="store_true", help="only show what several values of --top-p would cost")
    parser.add_argument("--min-experts", type=int, default=1, help="at least so many in each layer")
    parser.add_argument("--max-experts", type=int, help="at most so many in each layer")
    parser.add_argument("--out", type=Path, help="folder for an adapter_config.json with the selection")
    return parser


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect", help="show the experts of a model, or what an adapter holds"
    )
    parser.set_defaults(command=_inspect)
    parser.add_argument("path", help="folder or Hub name of a model, or folder of an adapter")
    return parser


def _add_report(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "report", help="a page on what tasks use, or on what adapters train"
    )
    parser.set_defaults(command=_report)
    parser.add_argument("paths", nargs="+", type=Path, help="files of scores of one model, folders of adapters")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.2, help="share that titles speak of (default: %(default)s)")
    parser.add_argument("--title", help="of the page")
    return parser


def _add_plan(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help="memory and communication of training a model on some GPUs"
    )
    parser.set_defaults(command=_plan)
    parser.add_argument("model", help="folder or Hub name of a model, or a config.json; no weights are read")
    parser.add_argument("--gpus", required=True, help="NUMBERxMEMORY, for example 8x80GB")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="on one GPU, in a forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the routed experts that ESFT trains (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of LoRA, for comparison (default: %(default)s)")
    return parser


def _score(options: argparse.Namespace) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ValueError(f"--out is {options.out}; it is a file for the scores, in a folder that exists")
    samples = SampleFile(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, device_map=options.device_map)
    batches = text_batches(samples, tokenizer, batch_size=options.batch_size, max_length=options.max_length)
    scores = score_experts(
        model,
        samples.located(batches),
        max_tokens=options.max_tokens,
        averaging=options.averaging,
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


def _select(options: argparse.Namespace) -> tuple[Any, str]:
    scores = ExpertScores.load(options.scores)
    if options.preview:
        if options.out is not None or options.min_experts != 1 or options.max_experts is not None:
            raise ValueError(
                "--preview only compares values of --top-p; leave out --out, --min-experts, --max-experts"
            )
        previews = preview_selections(scores, metric=options.metric)
        return [asdict(preview) for preview in previews], format_previews(previews)
    if options.out is not None:
        _check_config_folder(options.out)
    settings = {
        name: getattr(options, name) for name in ("metric", "top_p", "top_k", "budget", "min_experts", "max_experts")
    }
    selection = select_experts(scores, **settings)
    text = _bars({path: (len(ids), scores.containers[path].num_experts) for path, ids in selection.items()})
    if options.out is not None:
        ESFTConfig.from_scores(scores, **settings).save_pretrained(str(options.out))
        text += f"\nwritten to {options.out}/{CONFIG_NAME}; load it with ESFTConfig.from_pretrained"
    return selection, text


def _check_config_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out is {folder}, a file; it is the folder for an {CONFIG_NAME}")
    weights = [name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).exists()]
    if weights:
        raise ValueError(
            f"{folder} holds a trained adapter ({weights[0]}), which would lose its config; give another --out"
        )


def _inspect(options: argparse.Namespace) -> tuple[Any, str]:
    folder = Path(options.path)
    if (folder / CONFIG_NAME).exists():
        return _inspect_adapter(folder)
    if (folder / "expert_cfg.json").exists() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds files of the original code; make an adapter of them: peft-esft import")
    containers = find_experts(empty_model(options.path))
    if not containers:
        raise ValueError(f"{options.path} has no experts container of a known kind")
    record = {
        path: {"kind": c.kind, "num_experts": c.num_experts, "weights": c.weight_shapes}
        for path, c in containers.items()
    }
    lines = [
        f"{path}: {c.num_experts} experts of {c.parameters_per_expert:,} parameters ({c.kind})"
        for path, c in containers.items()
    ]
    return record, "\n".join(lines)


def _plan(options: argparse.Namespace) -> tuple[Any, str]:
    setup = Setup.parse(options.gpus, tokens=options.tokens, share=options.share, rank=options.rank)
    sizes = ModelSizes.of(empty_model(options.model))
    estimates = plan(sizes, setup)
    best = recommended(estimates, setup)
    record = {
        "model": asdict(sizes),
        "setup": asdict(setup),
        "estimates": [asdict(e) | {"total": e.total, "fits": e.fits(setup)} for e in estimates],
        "recommended": best.engine if best else None,
    }
    return record, format_plan(options.model, sizes, setup, estimates)


def _report(options: argparse.Namespace) -> tuple[Any, str]:
    from ..analysis import report

    out = report(options.paths, options.out, share=options.share, title=options.title)
    files = out.with_name(f"{out.stem}_files")
    record = {"out": str(out), "files": sorted(str(path) for path in files.iterdir())}
    return record, f"written to {out}, its figures and their numbers to {files}"


def _inspect_adapter(folder: Path) -> tuple[Any, str]:
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    config = read_config(folder)
    fields, selection = config.to_dict(), config.adapted_experts
    entries = AdapterFolder(folder).files.entries if weights.exists() else {}
    record = {
        "base": config.base_model_name_or_path,
        "revision": revision_of(fields),
        "task": (config.selection or {}).get("task"),
        "task_type": config.task_type,
        "storage": config.storage,
        "rank": config.rank,
        "train_shared_experts": config.train_shared_experts,
        "train_non_expert_modules": config.train_non_expert_modules,
        "modules_to_save": config.modules_to_save,
        "selection": config.selection,
        "target_experts": selection,
        "tensors": {key: list(entry.shape) for key, entry in entries.items()},
        "bytes": sum(entry.num_bytes for entry in entries.values()),
    }
    revision = f", revision {record['revision']}" if record["revision"] else ""
    lines = [
        f"ESFT adapter for {config.base_model_name_or_path or 'an unnamed base'}{revision}",
        f"experts chosen by: {describe_choice(fields) or 'not recorded'}",
    ]
    lines += [f"task: {record['task']}"] if record["task"] else []
    also = [name for name in ("train_shared_experts", "train_non_expert_modules", "modules_to_save") if record[name]]
    if also:
        lines.append(f"besides the experts: {', '.join(f'{name}={record[name]}' for name in also)}")
    known = num_experts_of(fields)
    most = max((max(ids) + 1 for ids in selection.values()), default=1)
    chart = _bars({path: (len(ids), known.get(path, most)) for path, ids in selection.items()})
    for line, (path, ids) in zip(chart.splitlines(), selection.items(), strict=True):
        total = f" of {known[path]}" if path in known else ""
        lines.append(f"{line}{total}: {', '.join(map(str, ids[:SHOWN]))}{', ...' * (len(ids) > SHOWN)}")
    if entries:
        lines.append(
            f"{describe_storage(config.to_dict())}: {len(entries)} tensors, {weights.stat().st_size / 1e6:.2f} MB"
        )
    return record, "\n".join(lines)


def _bars(counts: dict[str, tuple[int, int]]) -> str:
    """A bar chart in plain text: how many of how many, a line for each path."""
    width = max(map(len, counts), default=0)
    return "\n".join(
        f"{path:<{width}}  {'#' * max(1, round(BAR_WIDTH * count / most)):<{BAR_WIDTH}}  {count}"
        for path, (count, most) in counts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
