"""What the processes of the multi-process tests over quantised bases run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from peft_esft import ESFTQuantizationConfig, quantize_experts

from engines import (
    LAYOUTS,
    base_model,
    choose_fsdp_on_cpu,
    joint_batches,
    make_trainer,
    own_rows,
    shard,
    train,
    whole_deltas,
)
from oracle import config_for


FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4},
    "nf4 double": {"bits": 4, "double_quant": True},
    "nf4, kept": {"bits": 4, "keep": {0: [1, 3]}},
    "int8": {"bits": 8},
}


def adapted(form: str, checkpointing: bool = False) -> nn.Module:
    base = quantize_experts(base_model(), **FORMS[form])
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(base, config_for(base, task_type="CAUSAL_LM"))


def stored_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the quantised experts on this process."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".stored_" in name}


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


def _fsdp_settings() -> Iterator[tuple[str, str]]:
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        for loads_once in ("false", "true"):
            yield kind, loads_once


def trainer_fsdp2(rank: int, folder: Path) -> Any:
    """`Trainer` through accelerate's FSDP2 code, also where one process alone has the weights at first."""
    from accelerate.state import AcceleratorState

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    found: dict[str, Any] = {}
    for form in ("nf4, kept", "int8"):
        for kind, loads_once in _fsdp_settings():
            os.environ |= {"FSDP_STATE_DICT_TYPE": kind, "FSDP_CPU_RAM_EFFICIENT_LOADING": loads_once}
            AcceleratorState._reset_state(reset_partial_state=True)
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
        model = adapted("nf4")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=config)[0]
        try:
            for batch in joint_batches():
                rows = own_rows(batch)
                engine.backward(engine(input_ids=rows, labels=rows, use_cache=False)[0])
                engine.step()
            found["deltas"] = whole_deltas(engine.module)
        except NotImplementedError as error:
            found["error"] = stage, str(error)
    return found


def refused(rank: int, folder: Path) -> Any:
    """The errors of what would change the experts' weights, or cannot be shared out."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    choose_fsdp_on_cpu()
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
