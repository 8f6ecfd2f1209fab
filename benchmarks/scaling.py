"""The formulas of `peft-esft plan` against two processes on this machine: what they hold, and what they exchange.

    python benchmarks/scaling.py

Held bytes are counted on the tensors; exchanged ones on the collectives of the second step, as what a process receives
from the other. The peak of a step is measured by planned_memory.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_esft import ESFTConfig, find_experts, quantize_experts
from peft_esft.scoring.memory_estimate import Setup, estimate
from peft_esft.scoring.model_sizes import ModelSizes

from reporting import versions, write_results
from scoring import build_model


PROCESSES = 2
TRAINED = 8  # of 64 experts in each layer
TOKENS = (2, 256)
RANK = 16


class Exchanged(TorchDispatchMode):
    """Counts the bytes that a process gets from others."""

    total = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d._allgather_base_"):
            self.total += args[0].nbytes * (PROCESSES - 1) / PROCESSES
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.total += args[1].nbytes * (PROCESSES - 1) / PROCESSES
        elif name.startswith("_c10d_functional.all_to_all_single"):
            rank = dist.get_rank()
            rows = [size for process, size in enumerate(args[1]) if process != rank]
            self.total += sum(rows) * args[0][:1].nbytes if len(args[0]) else 0
        return function(*args, **(kwargs or {}))


def adapt(model: nn.Module, method: str) -> nn.Module:
    if method == "full":
        return model
    if method == "ESFT":
        return get_peft_model(
            model, ESFTConfig(target_experts={p: list(range(0, 64, 8)) for p in find_experts(model)})
        )
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=names))


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors: list[Any] = [*model.parameters(), *gradients, *states]
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def measure(rank: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(PROCESSES)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    builders: dict[tuple[str, str, str], Callable[[], nn.Module]] = {
        ("FSDP2", "ESFT", "fp32"): lambda: shard(adapt(checkpointed(build_model()), "ESFT")),
        ("FSDP2", "ESFT", "nf4"): lambda: shard(adapt(checkpointed(quantised(4)), "ESFT")),
        ("FSDP2", "ESFT", "int8"): lambda: shard(adapt(checkpointed(quantised(8)), "ESFT")),
        ("FSDP2", "full", "fp32"): lambda: shard(checkpointed(build_model())),
        ("EP", "ESFT", "fp32"): lambda: adapt(checkpointed(shared_out(folder)), "ESFT"),
    }
    found = {}
    for key, build in builders.items():
        torch.manual_seed(0)
        model = build().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        tokens = torch.randint(4096, TOKENS, generator=torch.Generator().manual_seed(rank))
        for _ in range(2):
            optimizer.zero_grad()
            with Exchanged() as exchanged:
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
        found[key] = {"held": held(model, optimizer), "exchanged": exchanged.total}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def quantised(bits: int) -> nn.Module:
    return quantize_experts(build_model().to(torch.bfloat16), bits=bits)


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def shard(model: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def shared_out(folder: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    layout = DistributedConfig(fsdp_size=PROCESSES, ep_size=PROCESSES)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=layout)


def row(name: str, computed: float, measured: float) -> dict[str, object]:
    return {
        "quantity": name,
        "computed (MB)": computed / 1e6,
        "measured (MB)": measured / 1e6,
        "error (%)": 100 * (computed / measured - 1),
    }


def main() -> None:
    model = build_model()
    sizes = ModelSizes.of(model)
    setup = Setup(PROCESSES, 0, tokens=TOKENS[0] * TOKENS[1], share=TRAINED / 64, lora_rank=RANK)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        mp.spawn(measure, (folder, 29600 + os.getpid() % 300), nprocs=PROCESSES)
        results = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(PROCESSES)]
    for engine, method, base in results[0]:
        expected = estimate(sizes, replace(setup, base=base), method, engine)
        for quantity, computed in (("held", expected.base + expected.state), ("exchanged", expected.sent)):
            measured = sum(result[engine, method, base][quantity] for result in results) / PROCESSES
            rows.append(row(f"{engine}, {method}, {base}: {quantity}", computed, measured))
    write_results(
        "scaling",
        "The plan's formulas against a small model",
        f"OLMoE-like model of benchmarks/scoring.py, {PROCESSES} processes, gloo, gradient checkpointing, "
        f"{TOKENS[0] * TOKENS[1]} tokens on each, {TRAINED} of 64 experts in each layer.",
        rows,
        versions(),
    )


if __name__ == "__main__":
    sys.exit(main())
