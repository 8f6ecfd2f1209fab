"""What the processes of the multi-process tests over quantised bases run."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_esft import ESFTQuantizationConfig, quantize_experts

import engines
from engines import (
    LAYOUTS,
    base_model,
    joint_batches,
    make_trainer,
    own_rows,
    shard,
    train,
    whole_deltas,
)


FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4},
    "nf4 double": {"bits": 4, "double_quant": True},
    "nf4, kept": {"bits": 4, "keep": {0: [1, 3]}},
    "int8": {"bits": 8},
}


def adapted(form: str, checkpointing: bool = False) -> nn.Module:
    return engines.adapted(quantize_experts(base_model(), **FORMS[form]), checkpointing)


def by_hand(rank: int, folder: Path) -> Any:
    """DDP, and FSDP2 with its checkpoints."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.nn.parallel import DistributedDataParallel

    from peft_esft.checkpoints import save_adapter

    batches = [own_rows(batch) for batch in joint_batches()]
    found: dict[str, Any] = {}
    for form in FORMS:
        model = DistributedDataParallel(adapted(form))
        train(model, batches)
        found[form, "DDP"] = whole_deltas(model.module)
        for checkpointing in (False, True):
            sharded = shard(adapted(form, checkpointing))
            train(sharded, batches)
            found[form, f"FSDP2, checkpointing {checkpointing}"] = whole_deltas(sharded)
        save_adapter(sharded, folder / form)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found[form, "full checkpoint"] = get_model_state_dict(sharded, options=options)
        trained = StateDictOptions(ignore_frozen_params=True)
        found[form, "trained"] = sorted(get_model_state_dict(sharded, options=trained))
    return found


def trainer_fsdp2(rank: int, folder: Path) -> Any:
    """`Trainer` through accelerate's FSDP2 code, also where one process alone has the weights at first."""
    kinds, loading = ("FULL_STATE_DICT", "SHARDED_STATE_DICT"), ("false", "true")
    found: dict[str, Any] = {}
    for form, kind, loads_once in product(("nf4, kept", "int8"), kinds, loading):
        engines.use_fsdp2(kind, FSDP_CPU_RAM_EFFICIENT_LOADING=loads_once)
        runs = folder / form / kind / loads_once
        trainer = make_trainer(runs / "run", 2, adapted(form))
        trainer.train()
        resumed = make_trainer(runs / "resumed", 2, adapted(form))
        resumed.train(resume_from_checkpoint=str(runs / "run" / "checkpoint-2"))
        found[form, kind, loads_once] = whole_deltas(trainer.model), whole_deltas(resumed.model)
    return found


def zero(rank: int, folder: Path) -> Any:
    """DeepSpeed's ZeRO on its CPU backend: the deltas of stage 2, and the error of stage 3."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for stage in (2, 3):
        try:
            found["deltas"] = engines.train_zero(engines.zero_engine(adapted("nf4"), stage))
        except NotImplementedError as error:
            found["error"] = stage, str(error)
    return found


def refused(rank: int, folder: Path) -> Any:
    """The errors of what would change the experts' weights, or cannot be shared out."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    found: dict[str, str] = {}
    for form in ("nf4", "int8"):
        model = adapted(form)
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        try:
            model(input_ids=own_rows(joint_batches()[0]))
        except RuntimeError as error:
            found[form] = str(error)
    for name, layout in LAYOUTS.items():
        for source in ("base", "quantised"):
            settings = {"quantization_config": ESFTQuantizationConfig(bits=8)} if source == "base" else {}
            try:
                AutoModelForCausalLM.from_pretrained(
                    folder / source, distributed_config=DistributedConfig(**layout), **settings
                )
            except NotImplementedError as error:
                found[f"{name}, {source}"] = str(error)
    return found
