"""Trains the experts that a task uses with TRL's `SFTTrainer`: load, score, choose, attach, measure, save."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import disable_progress_bars
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from ..analysis.routing_callback import RoutingCallback
from ..checkpoints import last_complete_checkpoint, save_adapter
from ..moe.containers import find_experts
from ..scoring.measure import score_experts
from ..scoring.memory_size import bytes_of
from ..scoring.model_sizes import ModelSizes
from ..scoring.scores import ExpertScores
from ..tuner.config import ESFTConfig
from .kinds import TRAIN_REPORT
from .loading import load_tokenizer, quantization_of
from .stopping import StopOnSignal
from .train_options import PAPER_LEARNING_RATE, TrainOptions
from .training_memory import memory_of_training, training_setup
from .training_rows import TrainingRows, check_chat_template, read_rows


SCORES = "scores.json"
CHOICE = ("metric", "top_p", "budget", "num_tokens")
SCORING = "scoring"
"""The name of an adapter that trains nothing: TRL prepares data and batches for a model with an adapter only."""
Wrap: TypeAlias = Callable[[PreTrainedModel], "PreTrainedModel | PeftModel"]


class Trainer(SFTTrainer):
    """TRL's trainer. The card is the adapter's own, which is written with the adapter."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing."""


@dataclass
class Finetuning:
    """A training run from the options to the report.

    Attributes:
        own: the options of the command.
        settings: TRL's options.
        rows: the data.
        sizes: of the base.
        trainer: has the model with the adapter that is to be trained.
        scores: what the choice of experts is from; None where no experts are chosen.
        notes: what was decided for the user, a line each.
    """

    own: TrainOptions
    settings: SFTConfig
    rows: TrainingRows
    sizes: ModelSizes
    trainer: Trainer
    scores: ExpertScores | None
    notes: list[str]

    @classmethod
    def prepare(cls, own: TrainOptions, settings: SFTConfig, wrap: Wrap | None = None) -> Finetuning:
        """Reads the data, loads the model, scores it and attaches the adapter.

        Args:
            own: the options of the command.
            settings: TRL's options.
            wrap: makes of the base what is to be trained, in place of scoring and an ESFT adapter.

        Raises:
            ValueError: if an option, the data or the model do not fit; most of it before the model is loaded.
        """
        check_out(Path(settings.output_dir), own.resume)
        _quieten(settings)
        scores = _scores_of_file(own, settings)
        rows = read_rows(
            str(own.dataset_name),
            own.eval,
            columns=own.columns,
            config=own.dataset_config,
            split=own.dataset_train_split,
            seed=settings.seed,
        )
        tokenizer = _load_tokenizer(own, settings)
        notes = _decide_loss(rows, tokenizer, settings)
        model = load_model(own, settings)
        if not find_experts(model):
            raise ValueError(f"{own.model_name_or_path} is not a mixture of experts: {type(model).__name__} has none")
        sizes = ModelSizes.of(model)
        if wrap is not None:
            return cls(own, settings, rows, sizes, _trainer(settings, rows, tokenizer, wrap(model)), None, notes)
        trainer, scores = _esft_trainer(own, settings, rows, tokenizer, model, scores)
        return cls(own, settings, rows, sizes, trainer, scores, notes)

    @property
    def config(self) -> ESFTConfig:
        """The config of the adapter."""
        config: ESFTConfig = self.trainer.model.peft_config["default"]
        return config

    @property
    def num_trained(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        if self.settings.max_steps > 0:
            return self.settings.max_steps
        batches = len(self.trainer.get_train_dataloader())
        in_epoch = max(1, math.ceil(batches / self.settings.gradient_accumulation_steps))
        return math.ceil(self.settings.num_train_epochs * in_epoch)

    def plan(self) -> dict[str, Any]:
        """What will be done: the numbers that `describe` writes out."""
        sizes = self.sizes
        chosen = [len(ids) for ids in self.config.adapted_experts.values()]
        tokens = tokens_in_a_batch(self.trainer)
        element = self.trainer.model.get_base_model().dtype.itemsize
        trained = self.num_trained
        return {
            "model": self.own.model_name_or_path,
            "parameters": sizes.total,
            "data": self.own.dataset_name,
            "format": self.rows.format,
            "rows": len(self.rows.train),
            "held_out_rows": len(self.rows.held_out),
            "held_out_from": self.rows.origin,
            "seed": self.settings.seed,
            "experts": sum(chosen),
            "experts_in_a_layer": [min(chosen), max(chosen)],
            "num_experts": sizes.num_experts,
            "layers": len(chosen),
            "choice": {key: (self.config.selection or {}).get(key) for key in CHOICE},
            "rank": self.own.rank,
            "trained_parameters": trained,
            "learning_rate": self.settings.learning_rate,
            "memory_estimate_bytes": memory_of_training(self.own, self.settings, sizes, trained, tokens, element),
            "tokens_in_a_batch": tokens,
            "steps": self.steps,
            "rows_in_a_step": self.settings.train_batch_size
            * self.settings.gradient_accumulation_steps
            * self.settings.world_size,
            "out": self.settings.output_dir,
            "notes": self.notes,
        }

    def run(self) -> dict[str, Any]:
        """Trains, measures and saves.

        Returns:
            The report, which is also in the folder.

        Raises:
            KeyboardInterrupt: if a signal ended the training; a checkpoint is in the folder then.
        """
        out, trainer, is_first = Path(self.settings.output_dir), self.trainer, self.settings.process_index == 0
        plan = self.plan()
        if is_first and self.scores is not None:
            out.mkdir(parents=True, exist_ok=True)
            self.scores.save(out / SCORES)
        routing = RoutingCallback.add_to(trainer)
        fitted = self.fit()
        save_adapter(trainer.model, out)
        layers = {path: _routing(layer) for path, layer in routing.layers.items()}
        report = {**plan, **fitted, "routing": layers, "log": trainer.state.log_history}
        if is_first:
            trainer.processing_class.save_pretrained(out)
            (out / TRAIN_REPORT).write_text(json.dumps(report, indent=1) + "\n")
        trainer.accelerator.wait_for_everyone()
        return report

    def fit(self) -> dict[str, Any]:
        """Trains, and measures the loss on the held-out rows before and after.

        Returns:
            The losses, the checkpoint that training went on from, if any, and the seconds of training.

        Raises:
            KeyboardInterrupt: as `run` does.
        """
        trainer, stop = self.trainer, StopOnSignal()
        trainer.add_callback(stop)
        before = trainer.evaluate()["eval_loss"]  # nothing is trained yet: this is the base's
        checkpoint = last_complete_checkpoint(self.settings.output_dir) if self.own.resume else None
        with stop.listening():
            trained = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopped:
            raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step} of {self.steps}")
        return {
            "held_out_loss": {"before": before, "after": trainer.evaluate()["eval_loss"]},
            "train_loss": trained.training_loss,
            "resumed_from": checkpoint,
            "seconds": trained.metrics["train_runtime"],
        }


def _quieten(settings: SFTConfig) -> None:
    """Shows no progress bars where nobody looks, and does not ask for pinned memory where there is no GPU."""
    if settings.disable_tqdm or settings.process_index:
        disable_progress_bars()
        logging.disable_progress_bar()
    if settings.device.type == "cpu":
        settings.dataloader_pin_memory = False


def check_out(out: Path, resume: bool) -> None:
    """Refuses a folder that an earlier run has filled, unless that run is to go on.

    Raises:
        ValueError: if the folder cannot be written to or holds a trained adapter, or checkpoints.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, a file; it is the folder for the adapter")
    if (out / "config.json").exists():
        raise ValueError(f"--out is {out}, which holds a model; name a new folder")
    if resume or not out.is_dir():
        return
    if (out / CONFIG_NAME).exists():
        raise ValueError(f"{out} holds a trained adapter already; name another --out")
    if last_complete_checkpoint(out) is not None:
        raise ValueError(f"{out} holds checkpoints of an earlier run: go on with --resume, or name another --out")


def _load_tokenizer(own: TrainOptions, settings: SFTConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with the chat template that `--chat-template-path` names, if any."""
    more = {"revision": own.model_revision, "trust_remote_code": settings.trust_remote_code}
    tokenizer = load_tokenizer(str(own.model_name_or_path), **more)
    if settings.chat_template_path is not None:
        path = Path(settings.chat_template_path)
        is_file = path.suffix in (".jinja", ".j2")
        tokenizer.chat_template = path.read_text() if is_file else AutoTokenizer.from_pretrained(path).chat_template
        settings.chat_template_path = None
    return tokenizer


def load_model(own: TrainOptions, settings: SFTConfig) -> PreTrainedModel:
    """Loads the base, in bf16 where training is, on this process's GPU unless something spreads it."""
    kwargs: dict[str, Any] = {
        "revision": own.model_revision,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": own.dtype or ("bfloat16" if settings.bf16 else "float32"),
        "attn_implementation": own.attn_implementation,
    }
    is_spread = settings.deepspeed is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if settings.device.type != "cpu" and not is_spread:
        kwargs["device_map"] = {"": settings.device}
    kwargs |= settings.model_init_kwargs or {}
    settings.model_init_kwargs = None
    config = {"revision": own.model_revision, "trust_remote_code": settings.trust_remote_code}
    kwargs |= quantization_of(str(own.model_name_or_path), own.bits, **config)
    return AutoModelForCausalLM.from_pretrained(str(own.model_name_or_path), **kwargs)


def _scores_of_file(own: TrainOptions, settings: SFTConfig) -> ExpertScores | None:
    """The scores that were given, or those of the run that goes on."""
    if own.experts is not None:
        return ExpertScores.load(own.experts)
    earlier = Path(settings.output_dir) / SCORES
    return ExpertScores.load(earlier) if own.resume and earlier.is_file() else None


def _decide_loss(rows: TrainingRows, tokenizer: PreTrainedTokenizerBase, settings: SFTConfig) -> list[str]:
    """Takes the loss on answers where the data has answers and the chat template marks them."""
    check_chat_template(rows.train, tokenizer, "--chat-template-path FILE")
    if settings.assistant_only_loss is not None:
        return []
    settings.assistant_only_loss = False
    if rows.format != "messages":
        return []
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return ["the chat template marks no answers, so the loss is that of whole conversations"]
    settings.assistant_only_loss = True
    return []


def _trainer(
    settings: SFTConfig, rows: TrainingRows, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel
) -> Trainer:
    trainer = Trainer(
        model, settings, train_dataset=rows.train, eval_dataset=rows.held_out, processing_class=tokenizer
    )
    if not len(trainer.train_dataset) or not len(trainer.eval_dataset):
        raise ValueError(f"no row has a token to learn within --max-length {settings.max_length}; give more")
    return trainer


def _esft_trainer(
    own: TrainOptions,
    settings: SFTConfig,
    rows: TrainingRows,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    scores: ExpertScores | None,
) -> tuple[Trainer, ExpertScores]:
    """The trainer with the adapter that is to be trained, and the scores that it is chosen by.

    Scoring takes the trainer's own batches: cut, templated, packed and shared out as in training.
    """
    first = ESFTConfig(target_experts={next(iter(find_experts(model))): [0]}, task_type="CAUSAL_LM")
    trainer = _trainer(settings, rows, tokenizer, get_peft_model(model, first, adapter_name=SCORING))
    if scores is None:
        with trainer.model.disable_adapter():
            scores = score_experts(
                trainer.model,
                _placed(trainer),
                max_tokens=own.score_tokens,
                progress=not settings.disable_tqdm and settings.process_index == 0,
            )
    budget: Any = own.budget
    if isinstance(budget, str):
        sizes = ModelSizes.of(model)
        scores = replace(scores, sizes=sizes)
        tokens, element = tokens_in_a_batch(trainer), model.dtype.itemsize
        memory = bytes_of("--budget", budget)
        budget = training_setup(own, settings, sizes, tokens, element, memory=memory)
    config = ESFTConfig.from_scores(
        scores,
        metric=own.metric,
        top_p=own.top_p,
        budget=budget,
        rank=own.rank,
        task=Path(str(own.dataset_name)).stem,
        task_type="CAUSAL_LM",
        base_model_name_or_path=own.model_name_or_path,
        revision=own.model_revision,
    )
    trainer.model.add_adapter("default", config)
    trainer.model.set_adapter("default")
    trainer.model.delete_adapter(SCORING)
    return trainer, scores


def tokens_in_a_batch(trainer: Trainer) -> int:
    """The number of tokens that one GPU sees in a forward pass, at most."""
    longest: int = trainer.args.max_length or max(map(len, trainer.train_dataset["input_ids"]))
    return trainer.args.per_device_train_batch_size * longest


def _placed(trainer: Trainer) -> Iterable[dict[str, Any]]:
    """The batches of training, without what only the loss needs."""
    for batch in trainer.get_train_dataloader():
        yield {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def _routing(layer: Any) -> dict[str, Any]:
    names = ("selected", "selected_share", "effective_experts", "hardly_used", "came_up")
    return {name: getattr(layer, name) for name in names}


def describe(plan: dict[str, Any]) -> str:
    """Writes a plan out."""
    least, most = plan["experts_in_a_layer"]
    each = str(least) if least == most else f"{least} to {most}"
    choice, rate = plan["choice"], plan["learning_rate"]
    given = {name: choice[name] for name in ("top_p", "budget") if choice[name] is not None}
    chosen_by = ", ".join(f"{name} {x if isinstance(x, str) else f'{x:.3g}'}" for name, x in given.items())
    paper = (
        "; the paper's, for a model of 16 B parameters: smaller ones take more" if rate == PAPER_LEARNING_RATE else ""
    )
    rank = f", of rank {plan['rank']}" if plan["rank"] else ""
    lines = {
        "model": f"{plan['model']}, {plan['parameters'] / 1e6:,.1f} M parameters",
        "data": f"{plan['data']}, {plan['rows']:,} rows of {plan['format']}; {plan['held_out_rows']:,} held out "
        f"({plan['held_out_from']})",
        "experts": f"{each} of {plan['num_experts']} in {plan['layers']} layers, {plan['experts']} in all; "
        f"{choice['metric']} score, {chosen_by}, {choice['num_tokens']:,} tokens scored",
        "trained": f"{plan['trained_parameters']:,} parameters, "
        f"{plan['trained_parameters'] / plan['parameters']:.1%} of the model{rank}",
        "memory": f"{plan['memory_estimate_bytes'] / 1e9:.2f} GB on one GPU, estimated for "
        f"{plan['tokens_in_a_batch']:,} tokens in a batch and gradient checkpointing",
        "steps": f"{plan['steps']:,}, of {plan['rows_in_a_step']} rows; learning rate {rate:g}{paper}",
        "out": plan["out"],
    }
    text = [f"{name:<8} {line}" for name, line in lines.items()]
    return "\n".join([*text, *(f"note     {note}" for note in plan["notes"])])
