"""Trains a model in several ways on the same rows, one after the other, and measures each, for `peft-esft compare`."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from trl import SFTConfig

from ..analysis.evaluation import Evaluation, evaluate
from ..analysis.evaluation_page import BASE, write_evaluation_page
from ..checkpoints import save_adapter
from ..moe.containers import quantisation_of
from ..scoring.memory_estimate import Method, estimate
from .finetune import SCORES, Finetuning, Wrap, tokens_in_a_batch
from .measuring import Rows, aligned, batches_of, decide_answers, general_rows, name_of
from .train_options import WAYS, CompareOptions, TrainOptions
from .training_memory import memory_of_training, training_setup


RESULTS, PAGE = "compare.json", "compare.html"
PLACES = ("output_dir", "logging_dir", "run_name", "disable_tqdm", "logging_steps", "report_to", "save_steps")
"""Options that change no result."""


@dataclass(frozen=True)
class Way:
    """A way to train: `name` in the table and in the folder, `kind` in `WAYS`, and the share of ESFT's experts."""

    name: str
    kind: str
    top_p: float | None = None


@dataclass
class Comparison:
    """The ways to train, and the results by name of the way; those of the base are under "base".

    Attributes:
        own: the options of the command.
        settings: TRL's options.
        general: the general texts.
        results: what each way took and gave.
        left_out: why full fine-tuning is not among the ways, if so.
    """

    own: CompareOptions
    settings: SFTConfig
    general: list[Rows]
    results: dict[str, dict[str, Any]]
    left_out: str = ""

    @classmethod
    def prepare(cls, own: CompareOptions, settings: SFTConfig) -> Comparison:
        """Reads the results of an earlier start, if there was one.

        Raises:
            ValueError: if an option is out of range, or the folder holds something else or results of other options.
        """
        _check(own, settings)
        results = _earlier_results(Path(settings.output_dir), _options(own, settings))
        return cls(own, settings, general_rows(own.general, own.max_rows), results)

    @property
    def out(self) -> Path:
        """The folder of results."""
        return Path(self.settings.output_dir)

    def ways(self) -> Iterator[Way]:
        """The ways to train, in order."""
        if "esft" in self.own.ways:
            yield from (Way(f"esft-{top_p:g}", "esft", top_p) for top_p in self.own.top_ps)
        yield from (Way(name, name) for name in WAYS[1:] if name in self.own.ways)

    def run(self) -> None:
        """Trains and measures each way that has no result yet, and writes the page.

        Raises:
            KeyboardInterrupt: if a signal ended a training; the next start goes on with it.
            ValueError: if full fine-tuning is the only way and does not fit.
        """
        self._save()  # marks the folder as this command's, for a start that is interrupted before the first result
        for way in self.ways():
            if way.name not in self.results:
                print(f"== {way.name}", flush=True)
                self._train(way)
        if BASE not in self.results:
            raise ValueError(f"full fine-tuning, the only one of --ways, is left out: {self.left_out}")
        try:
            self._write_page()
        except ImportError as error:
            print(f"peft-esft: no page is written: {error}", file=sys.stderr)

    def _train(self, way: Way) -> None:
        if way.kind == "full" and self._is_quantised():
            self.left_out = "the base is quantised"
            return
        tuning = Finetuning.prepare(*self._options_of(way), wrap=self._wrap_of(way))
        if way.kind == "full" and (reason := _does_not_fit(tuning)):
            self.left_out = reason
            return
        if BASE not in self.results:
            self._keep(BASE, self._measure(tuning))  # nothing is trained yet
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        fitted = tuning.run() if way.kind == "esft" else tuning.fit()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        folder = self.out / way.name
        if way.kind == "lora":
            save_adapter(tuning.trainer.model, folder)
        result = self._measure(tuning) | {
            "learning_rate": tuning.settings.learning_rate,
            "trained_parameters": tuning.num_trained,
            "steps": tuning.steps,
            "seconds": fitted["seconds"],
            "resumed": fitted["resumed_from"] is not None,
            "memory_estimate_bytes": _estimate(tuning, way),
            "peak_bytes": peak,
            "saved_bytes": _saved_bytes(folder) if way.kind != "full" else tuning.trainer.model.get_memory_footprint(),
        }
        if way.kind == "full":
            shutil.rmtree(folder, ignore_errors=True)  # checkpoints of a whole model
        self._keep(way.name, result)

    def _is_quantised(self) -> bool:
        """Whether the base is in few bits, which full fine-tuning cannot train. It is not loaded for this."""
        settings = {"revision": self.own.model_revision, "trust_remote_code": self.settings.trust_remote_code}
        config = AutoConfig.from_pretrained(str(self.own.model_name_or_path), **settings)
        return self.own.bits is not None or quantisation_of(config) is not None

    def _options_of(self, way: Way) -> tuple[TrainOptions, SFTConfig]:
        """The options of one training: each goes on from its last checkpoint, and experts are scored once."""
        own = TrainOptions(**{field.name: getattr(self.own, field.name) for field in fields(TrainOptions)})
        own.top_p, own.resume = way.top_p, True
        first = next(self.ways())
        scores = self.out / first.name / SCORES
        if own.experts is None and first.kind == "esft" and scores.is_file():
            own.experts = str(scores)
        settings = copy.copy(self.settings)
        settings.output_dir = str(self.out / way.name)
        if way.kind != "esft":
            settings.learning_rate = getattr(self.own, f"{way.kind}_learning_rate")
        if way.kind == "full":
            own.dtype = own.dtype or "float32"  # in bf16 most updates are lost to rounding
        return own, settings

    def _wrap_of(self, way: Way) -> Wrap | None:
        if way.kind == "full":
            return lambda model: model.requires_grad_(True)
        return partial(_with_lora, rank=self.own.lora_rank) if way.kind == "lora" else None

    def _measure(self, tuning: Finetuning) -> dict[str, Any]:
        """Measures a model on the held-out rows and the general texts."""
        trainer, rows = tuning.trainer, tuning.rows
        held_out = rows.held_out.select(range(min(len(rows.held_out), self.own.max_rows)))
        task = Rows(name_of(str(self.own.dataset_name)), held_out, rows.format, rows.origin)
        tokenizer = copy.deepcopy(trainer.processing_class)
        decide_answers(task, tokenizer)

        def measured(own: Rows) -> Evaluation:
            size, length = self.settings.per_device_eval_batch_size, self.settings.max_length or 1024
            return evaluate(trainer.model, batches_of(own, tokenizer, own.name, size, length))

        result = asdict(measured(task))
        if not task.answers_only:
            result["exact_match"] = None  # a whole text is not an answer
        return result | {"general": {own.name: measured(own).loss for own in self.general}}

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result
        self._save()

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        partial_file = self.out / f"{RESULTS}.part"
        record = {"options": _options(self.own, self.settings), "results": self.results}
        partial_file.write_text(json.dumps(record, indent=1) + "\n")
        partial_file.replace(self.out / RESULTS)

    def record(self) -> dict[str, Any]:
        """The results, for `--json`."""
        return {
            "model": self.own.model_name_or_path,
            "data": self.own.dataset_name,
            "out": str(self.out),
            "left_out": self.left_out,
            "ways": self.results,
        }

    def table(self) -> list[list[str]]:
        """The results as rows of a table, the first with the names of the columns."""
        base = self.results[BASE]
        has_answers = base["exact_match"] is not None
        texts = [rows.name for rows in self.general]
        header = ["way", "trained", "lr", "memory", "time", "saved", "loss"]
        table = [[*header, *(["exact match"] if has_answers else []), *(f"loss on {text}" for text in texts)]]
        for name, own in self.results.items():
            row = [name, *([""] * 5 if name == BASE else _cost_cells(own)), f"{own['loss']:.3f}"]
            row += [f"{own['exact_match']:.1%}"] if has_answers else []
            for text in texts:
                loss, change = own["general"][text], own["general"][text] - base["general"][text]
                row.append(f"{loss:.3f}" if name == BASE else f"{loss:.3f} ({change:+.3f})")
            table.append(row)
        return table

    def describe(self) -> str:
        """Writes the results out as text."""
        base = self.results[BASE]
        steps = next(own["steps"] for name, own in self.results.items() if name != BASE)
        lines = [
            f"{self.own.model_name_or_path} on {self.own.dataset_name}: {steps:,} steps each; loss on "
            f"{base['num_samples']:,} held-out rows, {base['num_tokens']:,} tokens",
            aligned(self.table()),
        ]
        if any(own.get("peak_bytes") is None for name, own in self.results.items() if name != BASE):
            lines.append("~: estimated for one GPU, as `peft-esft plan` does")
        if any(own.get("resumed") for own in self.results.values()):
            lines.append(">: training was interrupted; the time is that since its last start")
        if self.left_out:
            lines.append(f"full fine-tuning is left out: {self.left_out}")
        return "\n".join([*lines, f"written to {self.out}"])

    def _write_page(self) -> None:
        before = self.results[BASE]["general"]
        known = {field.name for field in fields(Evaluation)}
        measured = {
            name: Evaluation(**{key: value for key, value in own.items() if key in known})
            for name, own in self.results.items()
        }
        losses = {
            name: {text: (before[text], loss) for text, loss in own["general"].items()}
            for name, own in self.results.items()
            if name != BASE
        }
        task, has_answers = name_of(str(self.own.dataset_name)), self.results[BASE]["exact_match"] is not None
        write_evaluation_page(self.out / PAGE, task, measured, losses, self.table(), has_answers=has_answers)


def _check(own: CompareOptions, settings: SFTConfig) -> None:
    if unknown := [way for way in own.ways if way not in WAYS]:
        raise ValueError(f"--ways has {unknown[0]!r}; it takes {', '.join(WAYS)}")
    if wrong := [top_p for top_p in own.top_ps if not 0 < top_p <= 1]:
        raise ValueError(f"--top-ps has {wrong[0]:g}; each is a share above 0 and at most 1")
    for name in ("lora_rank", "max_rows"):
        if getattr(own, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(own, name)}; it is at least 1")
    if own.top_p is not None or own.budget is not None:
        raise ValueError("compare takes --top-ps, the shares to compare, in place of --top-p and --budget")
    if own.dry_run or own.resume:
        raise ValueError("compare takes neither --dry-run nor --resume: the same command goes on by itself")
    if settings.world_size > 1:
        raise ValueError("compare runs in one process; start it without accelerate launch or torchrun")


def _options(own: CompareOptions, settings: SFTConfig) -> dict[str, Any]:
    """What the results depend on, as JSON has it."""
    values = {key: value for key, value in settings.to_dict().items() if key not in PLACES}
    return dict(json.loads(json.dumps(values | asdict(own), default=str)))


def _earlier_results(out: Path, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results in a folder.

    Raises:
        ValueError: if the folder holds something else, or results of other options.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    try:
        record = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        earlier, results = dict(record["options"]), dict(record["results"])
    except FileNotFoundError:
        raise ValueError(f"--out is {out}, which holds something else; name a new folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / RESULTS} is damaged ({error}); name a new folder") from error
    if not results:
        return {}  # nothing was trained
    changed = [key for key in options.keys() | earlier.keys() if options.get(key) != earlier.get(key)]
    if changed:
        key = min(changed)
        raise ValueError(
            f"{out} holds results with {key}={earlier.get(key)}, and now {key}={options.get(key)}; name a new folder"
        )
    return results


def _with_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """LoRA on the linear layers of attention, scaled by 2, as in the paper (arXiv 2407.01906)."""
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    attention = [path for path in linear if any("att" in part for part in path.split("."))]
    if not attention:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in attention for LoRA; leave it out: --ways esft"
        )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(attention), task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _does_not_fit(tuning: Finetuning) -> str:
    """Why full fine-tuning cannot be run here; empty if it can."""
    needed, memory = _estimate(tuning, Way("full", "full")), _memory()
    return f"it takes about {needed / 1e9:.3g} GB of {memory / 1e9:.3g}" if needed > memory else ""


def _memory() -> float:
    """Bytes of the GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _estimate(tuning: Finetuning, way: Way) -> float:
    own, settings, sizes = tuning.own, tuning.settings, tuning.sizes
    tokens, model = tokens_in_a_batch(tuning.trainer), tuning.trainer.model
    element = next(model.parameters()).dtype.itemsize
    if way.kind == "esft":
        return memory_of_training(own, settings, sizes, tuning.num_trained, tokens, element)
    method: Method = "full" if way.kind == "full" else "LoRA attention"
    rank = model.peft_config["default"].r if way.kind == "lora" else 16
    return estimate(sizes, training_setup(own, settings, sizes, tokens, element, lora_rank=rank), method).total


def _saved_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _cost_cells(own: dict[str, Any]) -> list[str]:
    estimated = own["peak_bytes"] is None
    memory = own["memory_estimate_bytes"] if estimated else own["peak_bytes"]
    time = f"{own['seconds']:,.0f} s" if own["seconds"] >= 1 else f"{own['seconds']:.1f} s"
    return [
        f"{own['trained_parameters']:,}",
        f"{own['learning_rate']:g}",
        f"{'~' if estimated else ''}{memory / 1e9:.2f} GB",
        f"{'>' if own.get('resumed') else ''}{time}",
        f"{own['saved_bytes'] / 1e6:,.1f} MB",
    ]
