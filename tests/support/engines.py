"""What the processes of the multi-process tests run. Each worker writes what it found to a file of its rank."""

from __future__ import annotations

import copy
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch import Tensor, nn

from peft_esft import find_experts

from families import tiny_model
from oracle import SELECTION, config_for, deltas_of, random_tokens


PROCESSES = 2
STEPS = 3
FAMILY = "olmoe"

Worker = Callable[[int, Path], Any]


def run(worker: Worker, folder: Path, processes: int = PROCESSES) -> list[Any]:
    """Runs a function of rank and folder in processes joined by gloo; what each returns, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_start, (worker, folder, port, processes), nprocs=processes)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


def _start(rank: int, worker: Worker, folder: Path, port: int, processes: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
    }
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(worker(rank, folder), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def base_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return tiny_model(FAMILY, dtype)


def adapted(base: nn.Module, checkpointing: bool = False) -> nn.Module:
    base = copy.deepcopy(base)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(base, config_for(base, task_type="CAUSAL_LM"))


def joint_batches() -> list[Tensor]:
    """The batches of one process; each of two takes half of the rows.

    Rows of the second half repeat one token, so that most experts get none there.
    """
    batches = [random_tokens(4, 12, seed=seed) for seed in range(STEPS)]
    for step, batch in enumerate(batches):
        batch[2:] = 5 + step
    return batches


def own_rows(batch: Tensor) -> Tensor:
    rows = len(batch) // PROCESSES
    return batch[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


def train(model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Steps of SGD with momentum: unlike Adam's, they are proportional to the gradients, errors included."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9) if optimizer is None else optimizer
    for batch in batches:
        model(input_ids=batch, labels=batch, use_cache=False)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def whole_deltas(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    return {key: whole(delta) for key, delta in deltas_of(model).items()}


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """The base's weights by their names in the base."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): whole(parameter)
        for name, parameter in model.named_parameters()
        if ".esft_" not in name
    }


def tokens_of_selected_experts(base: nn.Module, rows: Tensor) -> list[int]:
    """How many (token, expert) pairs of a batch each selected expert of each container has."""
    counts: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts.extend(int((args[1] == expert).sum()) for expert in SELECTION)

    handles = [c.module.register_forward_pre_hook(count) for c in find_experts(base).values()]
    with torch.no_grad():
        base(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


def scores_of(model: nn.Module, share: Callable[[Tensor], Tensor]) -> Any:
    """What scoring finds, each process having its part of the samples."""
    from peft_esft import score_experts

    batches = [{"input_ids": share(batch)} for batch in joint_batches()]
    return score_experts(model, batches, progress=False)


def uneven_scores(model: nn.Module, rank: int | None) -> Any:
    """What scoring finds if the second process has one batch, and the first three."""
    from peft_esft import score_experts

    batches = joint_batches()
    inputs = [batches, batches[:1]][rank] if rank is not None else [*batches, batches[0]]
    return score_experts(model, [{"input_ids": batch} for batch in inputs], progress=False)


def shard(model: nn.Module) -> nn.Module:
    """FSDP2 by hand, as torch's documentation has it: each decoder layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def ddp(rank: int, folder: Path) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    from peft_esft.checkpoints import save_adapter

    found = {"tokens": tokens_of_selected_experts(base_model(), own_rows(joint_batches()[0]))}
    for checkpointing in (False, True):
        model = DistributedDataParallel(adapted(base_model(), checkpointing))
        train(model, [own_rows(batch) for batch in joint_batches()])
        found[f"deltas, checkpointing {checkpointing}"] = whole_deltas(model.module)
    found["base"] = base_of(model.module)
    found["scores"] = scores_of(model.module, own_rows)
    save_adapter(model, folder / "adapter")
    return found


def fsdp2(rank: int, folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.tensor import DTensor

    from peft_esft.checkpoints import save_adapter

    batches = [own_rows(batch) for batch in joint_batches()]
    found: dict[str, Any] = {}
    for checkpointing in (False, True):
        model = shard(adapted(base_model(), checkpointing))
        optimizer = train(model, batches)
        found[f"deltas, checkpointing {checkpointing}"] = whole_deltas(model)
    # The graph is made before anything ran outside of it, and after sharding took the place of what was known.
    compiled = shard(adapted(base_model()).to("cpu"))
    train(torch.compile(compiled, backend="eager"), batches)
    found["deltas, compiled"] = whole_deltas(compiled)
    found["base"] = base_of(model)
    found["held"] = {name: parameter.to_local().numel() for name, parameter in model.named_parameters()}
    found["scores"] = scores_of(model, own_rows)
    found["scores of uneven data"] = uneven_scores(model, rank)
    gathered: list[tuple[int, ...]] = []
    original = DTensor.full_tensor
    DTensor.full_tensor = lambda tensor, *args, **kwargs: (  # type: ignore[method-assign]
        gathered.append(tuple(tensor.shape)) or original(tensor, *args, **kwargs)
    )
    save_adapter(model, folder / "adapter")
    DTensor.full_tensor = original  # type: ignore[method-assign]
    found["gathered for the adapter"] = gathered

    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    found["full checkpoint"] = full
    trained = StateDictOptions(ignore_frozen_params=True)
    state = {
        "model": get_model_state_dict(model, options=trained),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder / "sharded")
    train(model, batches, optimizer)
    found["deltas after six steps"] = whole_deltas(model)
    # A fresh model takes up training where the checkpoint left it.
    model = shard(adapted(base_model()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    state = {
        "model": get_model_state_dict(model, options=trained),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder / "sharded")
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, batches, optimizer)
    found["deltas after resuming"] = whole_deltas(model)
    # Half-precision bases have deltas in fp32.
    model = shard(adapted(base_model(torch.bfloat16)))
    train(model, batches)
    found["deltas on a bf16 base"] = whole_deltas(model)
    return found


def trainer_settings(folder: Path, batch_size: int, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": 0.1,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-2,  # steps are then about proportional to the gradients, errors included
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }


def make_trainer(folder: Path, batch_size: int, model: nn.Module | None = None, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in random_tokens(24, 12, seed=3)]
    arguments = TrainingArguments(**trainer_settings(folder, batch_size, **settings))
    if "ACCELERATE_USE_FSDP" in os.environ or hasattr(getattr(model, "config", None), "distributed_config"):
        choose_fsdp_on_cpu()
    model = adapted(base_model()) if model is None else model
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])


def run_trainer(folder: Path, batch_size: int, **settings: Any) -> dict[str, Any]:
    """Trains, and trains again from the checkpoint in the middle."""
    trainer = make_trainer(folder / "run", batch_size, **settings)
    trainer.train()
    found: dict[str, Any] = {"deltas": whole_deltas(trainer.model)}
    found["losses"] = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    resumed = make_trainer(folder / "resumed", batch_size, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    found["deltas after resuming"] = whole_deltas(resumed.model)
    found["trainer"] = trainer
    return found


def trainer_ddp(rank: int, folder: Path) -> Any:
    found = run_trainer(folder, 2)
    del found["trainer"]
    return found


def choose_fsdp_on_cpu() -> None:
    """Has accelerate choose its FSDP2 code, as it does on a GPU: the CPU is not on its list of devices for it."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def use_fsdp2(state_dict_type: str, **settings: str) -> None:
    """Has the trainers that are made from now on take accelerate's FSDP2 code."""
    from accelerate.state import AcceleratorState

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": state_dict_type,
        **settings,
    }
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_fsdp2(rank: int, folder: Path) -> Any:
    """`Trainer` through accelerate's FSDP2 code."""
    from peft_esft.checkpoints import save_adapter

    found = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        use_fsdp2(kind)
        found[kind] = run_trainer(folder / kind, 2)
        trainer = found[kind].pop("trainer")
        save_adapter(trainer.model, folder / kind / "adapter")
        found[kind]["sharded"] = all(hasattr(p, "placements") for p in trainer.model.parameters())
    return found


EP_FAMILY = "qwen3_moe"
EP_SELECTION = {"model.layers.0.mlp.experts": [6, 5], "model.layers.1.mlp.experts": [5, 1, 6]}
"""The first process owns none of the first layer's selected experts, and one of the second's."""
LAYOUTS = {
    "one batch, ep 2, tp 2": {"tp_size": 2, "ep_size": 2},
    "two batches, ep 2, fsdp 2": {"fsdp_size": 2, "ep_size": 2},
}


def ep_adapted(base: nn.Module, **settings: Any) -> nn.Module:
    from peft_esft import ESFTConfig

    config = ESFTConfig(target_experts=EP_SELECTION, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(7)  # low-rank factors are drawn
    return get_peft_model(base, config)


def clipped_step(model: nn.Module, batch: Tensor) -> float:
    """The norm that gradient clipping finds."""
    model(input_ids=batch, labels=batch, use_cache=False)[0].backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.01)
    model.zero_grad()
    return float(whole(norm))


def expert_parallel(rank: int, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from peft_esft.checkpoints import adapter_weights, save_adapter

    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        share = own_rows if "fsdp_size" in layout else lambda batch: batch
        batches = [share(batch) for batch in joint_batches()]

        def load() -> nn.Module:
            return AutoModelForCausalLM.from_pretrained(
                folder / "base",
                distributed_config=DistributedConfig(**layout),  # noqa: B023
            )

        for rank_setting in (None, 2):
            model = ep_adapted(load(), rank=rank_setting)
            found[name, rank_setting, "norm"] = clipped_step(model, batches[0])
            train(model, batches)
            adapter = folder / f"{name}, rank {rank_setting}"
            save_adapter(model, adapter)
            model.eval()
            with torch.no_grad():
                found[name, rank_setting, "logits"] = whole(model(input_ids=batches[0])[0])
                reloaded = PeftModel.from_pretrained(load(), adapter).eval()
                found[name, rank_setting, "reloaded"] = whole(reloaded(input_ids=batches[0])[0])
                reloaded.merge_adapter(safe_merge=True)
                found[name, rank_setting, "merged"] = whole(reloaded(input_ids=batches[0])[0])
                reloaded.unmerge_adapter()
                with reloaded.disable_adapter():
                    found[name, rank_setting, "disabled"] = whole(reloaded(input_ids=batches[0])[0])
            found[name, rank_setting, "weights"] = adapter_weights(model)
            found[name, "scores"] = scores_of(model, share)
            model.save_pretrained(folder / f"{name}, by PEFT", is_main_process=rank == 0)
            found[name, rank_setting, "resumed"] = resumed_by_dcp(
                folder / f"{name}, rank {rank_setting}, sharded",
                model,
                ep_adapted(load(), rank=rank_setting),
                batches,
            )
        found[name, "held"] = {n: p.to_local().shape for n, p in model.named_parameters() if ".esft_" in n}
    return found


def expert_parallel_of_four(rank: int, folder: Path) -> Any:
    """An adapter of one process, loaded, exchanged for another one and trained on by four."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from peft_esft import hotswap_adapter
    from peft_esft.checkpoints import save_adapter

    found: dict[Any, Any] = {}
    for tp_size in (1, 2):
        layout = DistributedConfig(tp_size=tp_size, fsdp_size=4 // tp_size, ep_size=4)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=layout)
        model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
        with torch.no_grad():
            found[tp_size] = whole(model(input_ids=joint_batches()[0])[0])
            for name in ("other", "adapter"):
                hotswap_adapter(model, folder / name)
                found[tp_size, f"swapped for {name}"] = whole(model(input_ids=joint_batches()[0])[0])
        train(model, [batch.chunk(4 // tp_size)[rank // tp_size] for batch in joint_batches()])
        save_adapter(model, folder / f"trained on, tp {tp_size}")
    return found


def resumed_by_dcp(
    folder: Path, model: nn.Module, fresh: nn.Module, batches: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a run that went on, and of a fresh model that took it up from a distributed checkpoint."""
    import torch.distributed.checkpoint as dcp

    from peft_esft.checkpoints import adapter_weights

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {
            "model": trained,
            "optimizer": {name: optimizer.state[parameter] for name, parameter in trained.items()},
        }

    model.train()
    optimizer = train(model, batches)
    dcp.save(state(model, optimizer), checkpoint_id=folder)
    train(model, batches, optimizer)
    optimizer = train(fresh, batches[:1])  # makes room for the state
    dcp.load(state(fresh, optimizer), checkpoint_id=folder)
    train(fresh, batches, optimizer)
    return adapter_weights(model), adapter_weights(fresh)


def refused(rank: int, folder: Path) -> Any:
    """The errors of layouts that deltas cannot be combined with."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    found = {}
    for layout in ("tp_size", "fsdp_size"):
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", distributed_config=DistributedConfig(**{layout: 2})
        )
        try:
            ep_adapted(model)
        except NotImplementedError as error:
            found[layout] = str(error)
    # A mesh of more processes than this test has, from its shape alone.
    from peft_esft.tuner.layers import expert_parallel

    container = next(iter(find_experts(model).values()))
    container.module._is_expert_parallel = True
    expert_parallel._mesh_sizes = lambda parameter: {"efsdp": 2, "ep": 4}
    try:
        ep_adapted(model)
    except NotImplementedError as error:
        found["experts also sharded"] = str(error)
    return found


def trainer_expert_parallel(rank: int, folder: Path) -> Any:
    """`Trainer` on a model that transformers has shared out. Such models it trains and saves, but does not resume."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    found = {}
    for name, layout in LAYOUTS.items():
        base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=DistributedConfig(**layout))
        batch_size = 2 if "fsdp_size" in layout else 4
        trainer = make_trainer(folder / name, batch_size, ep_adapted(base), save_only_model=True)
        trainer.train()
        found[name] = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return found


def zero_engine(model: nn.Module, stage: int) -> Any:
    """DeepSpeed's engine around a model with an adapter."""
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9)
    return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=config)[0]


def train_zero(engine: Any) -> dict[tuple[str, str], Tensor]:
    """Trains on this process's part of the batches; the deltas of all processes."""
    import deepspeed

    engine.train()
    for batch in joint_batches():
        rows = own_rows(batch)
        engine.backward(engine(input_ids=rows, labels=rows, use_cache=False)[0])
        engine.step()
    with deepspeed.zero.GatheredParameters(list(deltas_of(engine.module).values())):
        return whole_deltas(engine.module)


def zero(rank: int, folder: Path) -> Any:
    """DeepSpeed's ZeRO on its CPU backend."""
    import deepspeed

    from peft_esft.checkpoints import save_adapter

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for stage in (2, 3):
        for checkpointing in (False, True):
            trained = zero_engine(adapted(base_model(), checkpointing), stage)
            found[f"deltas, stage {stage}, checkpointing {checkpointing}"] = train_zero(trained)
        found[f"held, stage {stage}"] = sum(
            getattr(parameter, "ds_tensor", parameter).numel() for parameter in trained.module.parameters()
        )
        save_adapter(trained, folder / f"stage {stage}")
        trained.save_checkpoint(str(folder / f"checkpoint {stage}"), exclude_frozen_parameters=True)
        found[f"six steps, stage {stage}"] = train_zero(trained)
        resumed = zero_engine(adapted(base_model()), stage)
        resumed.load_checkpoint(str(folder / f"checkpoint {stage}"), load_module_strict=False)
        found[f"resumed, stage {stage}"] = train_zero(resumed)
        found[f"scores, stage {stage}"] = scores_of(resumed.module, own_rows)
    # A base that is shared out already, as `from_pretrained` leaves it under ZeRO-3.
    base = base_model()
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=base, config_dict_or_path=settings)
    attached = get_peft_model(base, config_for(base))
    found["attached to a shared-out base"] = {key: tuple(delta.shape) for key, delta in deltas_of(attached).items()}
    return found
