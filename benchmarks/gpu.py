"""ESFT on a GPU beside full fine-tuning, LoRA and modules in place: time, peak memory, waits of the host.

    python benchmarks/gpu.py [--minutes 9] [--out benchmarks/results/gpu.json] [--tiny]

Random weights at the sizes of real layers, bf16; nothing is fetched. The parts run in order of importance and each is
saved as soon as it ends; none begins that would not end in time. `--tiny` runs everything on the CPU in tiny sizes,
to see that it runs. Times are milliseconds, medians of rounds in which the ways take turns.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_esft import AdapterPool, ESFTConfig, find_experts, quantize_experts
from peft_esft.ops import grouped_mm

from layer_step import build_ways, route, step_of
from reporting import RESULTS, host_waits, versions
from ways import TrainingStep


SIZES = {  # hidden, inside an expert, heads, experts, top k, vocabulary, layers that are built
    "OLMoE-1B-7B": (2048, 1024, 16, 64, 8, 50304, 4),
    "Qwen3-30B-A3B": (2048, 768, 32, 128, 8, 151936, 4),
    "DeepSeek-V2-Lite": (2048, 1408, 16, 64, 6, 102400, 3),
}
TINY = (64, 32, 4, 16, 4, 128, 2)
WAYS = ("ESFT", "full", "LoRA r 16", "modules")


class Bench:
    """Where the parts run, and how they are measured."""

    def __init__(self, is_tiny: bool) -> None:
        self.is_tiny = is_tiny
        self.device = "cpu" if is_tiny else "cuda"
        self.rounds = 1 if is_tiny else 9

    def sync(self) -> None:
        if not self.is_tiny:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if not self.is_tiny:
            torch.cuda.empty_cache()

    def times(self, calls: dict[str, Callable[[], object]]) -> dict[str, Any]:
        """The median of each call in milliseconds; of one that fails, the error."""
        seconds: dict[str, list[float]] = {}
        failed: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                call()
                seconds[name] = []
            except Exception as error:
                failed[name] = _shortened(error)
        for _ in range(self.rounds):
            for name, own in seconds.items():
                self.sync()
                started = time.perf_counter()
                calls[name]()
                self.sync()
                own.append(time.perf_counter() - started)
        return failed | {name: round(1e3 * statistics.median(own), 3) for name, own in seconds.items()}

    def waits(self, call: Callable[[], object]) -> int | None:
        """How often the host waits in a call, as CUDA itself says."""
        return None if self.is_tiny else host_waits(call)

    def peak(self, call: Callable[[], object]) -> float | None:
        """The most memory in GB that is allocated at once during a call."""
        if self.is_tiny:
            return None
        self.free()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.sync()
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)

    def model(self, name: str, dtype: torch.dtype = torch.bfloat16) -> OlmoeForCausalLM:
        """An OLMoE with the layers' sizes of another model: the experts are what is compared."""
        hidden, intermediate, heads, experts, top_k, vocabulary, layers = TINY if self.is_tiny else SIZES[name]
        torch.manual_seed(0)
        config = OlmoeConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_experts=experts,
            num_experts_per_tok=top_k,
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            max_position_embeddings=8192,
            pad_token_id=0,
            eos_token_id=None,
        )
        with torch.device(self.device):
            model = OlmoeForCausalLM._from_config(config, dtype=dtype)
        model.set_experts_implementation("grouped_mm")
        return model.eval()

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(3, 100, (rows, min(length, 16) if self.is_tiny else length), device=self.device)


def adapt(model: nn.Module, names: tuple[str, ...] = ("default",), **settings: object) -> PeftModel:
    """The model with adapters on a tenth of each layer's experts."""
    adapted: PeftModel | None = None
    for place, name in enumerate(names):
        selection = {
            path: list(range(place % 10, container.num_experts, 10)) for path, container in find_experts(model).items()
        }
        config = ESFTConfig(target_experts=selection, init_weights=False, **settings)
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    assert adapted is not None
    return adapted


def values(bench: Bench) -> dict[str, Any]:
    """The relative error of a step's loss and gradients on the device, beside the CPU's."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        for length in (2, 300):
            host = adapt(Bench(is_tiny=True).model("tiny", dtype))
            device = copy.deepcopy(host).to(bench.device)
            tokens = torch.randint(3, 100, (2, length))
            losses = []
            for model, place in ((host, "cpu"), (device, bench.device)):
                moved = tokens.to(place)
                loss = model(input_ids=moved, labels=moved, use_cache=False).loss
                loss.backward()
                losses.append(loss.item())
            pairs = zip(device.parameters(), host.parameters(), strict=True)
            worst = max(
                ((own.grad.cpu() - other.grad).norm() / other.grad.norm()).item()
                for own, other in pairs
                if other.grad is not None
            )
            errors[f"{dtype}, {2 * length} tokens"] = [abs(losses[0] - losses[1]) / losses[0], worst]
    return errors


def operators(bench: Bench) -> dict[str, Any]:
    """torch's grouped product: is it a kernel here, and what does the package believe."""
    result = {}
    size = 64 if bench.is_tiny else 2048
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.randn(64, size, dtype=dtype, device=bench.device)
        matrices = torch.randn(64, size, size, dtype=dtype, device=bench.device)
        ends = torch.arange(1, 65, dtype=torch.int32, device=bench.device)

        def call(rows: torch.Tensor = rows, matrices: torch.Tensor = matrices, ends: torch.Tensor = ends) -> object:
            return torch.nn.functional.grouped_mm(rows, matrices, offs=ends)

        result[str(dtype)] = {
            "ms": bench.times({"ms": call})["ms"],
            "waits": bench.waits(call),
            "believed": grouped_mm.has_fast_kernel(rows.device, dtype),
        }
    return result


def layer(bench: Bench, name: str, tokens: int) -> dict[str, Any]:
    """A training step of one experts layer over its bound, see `layer_step.py`."""
    hidden, intermediate, _, experts, top_k, _, _ = TINY if bench.is_tiny else SIZES[name]
    case = (experts, top_k, hidden, intermediate, max(1, experts // 10), 64 if bench.is_tiny else tokens)
    with torch.device(bench.device):
        torch.manual_seed(0)
        gates, ids = route(case)
        share = float((ids < case[4]).float().mean())
        states = torch.randn(case[5], hidden, dtype=torch.bfloat16, requires_grad=True)
        gates = gates.to(torch.bfloat16).requires_grad_()
        gradient = torch.randn(case[5], hidden, dtype=torch.bfloat16)
        ways = build_ways(case, torch.bfloat16, with_slow=False)
    steps = {way: step_of(module.to(bench.device), states, ids, gates, gradient) for way, module in ways.items()}
    times = bench.times(steps)
    bound = times["frozen"] + share * (times["full"] - times["frozen"])
    return {"ms": times, "ESFT over the bound": round(times["ESFT"] / bound, 3), "waits": bench.waits(steps["ESFT"])}


def training(bench: Bench, name: str, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """A training step of a model, AdamW included. The peak has the base that all start from in it."""
    base = bench.model(name)
    experts = next(iter(find_experts(base).values())).num_experts
    result: dict[str, Any] = {}
    for way in WAYS:  # one after another: several would not fit
        try:
            step = TrainingStep(way, base, max(1, experts // 10), bench.tokens(1, tokens), checkpointing)
            result[way] = bench.times({"ms": step}) | {"peak GB": bench.peak(step), "waits": bench.waits(step)}
            del step
        except Exception as error:
            result[way] = _shortened(error)
        bench.free()
    return result


def inference(bench: Bench, name: str, rows: int, length: int) -> dict[str, Any]:
    """Prefill or decoding: the base in two implementations, an adapter, a mixed batch, and merged."""
    model, tokens = bench.model(name), bench.tokens(rows, length)
    adapters = tuple(f"a{place}" for place in range(min(rows, 20)))
    result: dict[str, Any] = {}

    def measure(what: str, call: Callable[[], object]) -> None:
        result[what] = bench.times({"ms": call}) | {"waits": bench.waits(call)}

    with torch.no_grad():
        for implementation in ("batched_mm", "grouped_mm") if rows * length <= 256 else ("grouped_mm",):
            model.set_experts_implementation(implementation)
            measure(f"base, {implementation}", lambda: model(input_ids=tokens, use_cache=False))
        adapted = adapt(model, adapters, inference_mode=True).eval()
        for adapter in adapters:
            adapted.base_model.freeze_adapter(adapter)
        adapted.base_model.set_adapter(adapters[0], inference_mode=True)
        names = [adapters[row % len(adapters)] for row in range(rows)]
        with adapted.base_model.hold():  # as `generate` does
            measure("ESFT", lambda: adapted(input_ids=tokens, use_cache=False))
            measure(
                f"{len(adapters)} adapters", lambda: adapted(input_ids=tokens, use_cache=False, adapter_names=names)
            )
        adapted.merge_adapter([adapters[0]])
        measure("merged", lambda: adapted(input_ids=tokens, use_cache=False))
    return result


def quantised(bench: Bench, name: str) -> dict[str, Any]:
    """A base in bf16, int8 and NF4: bytes, a training step of ESFT, a prefill and decoding."""
    result: dict[str, Any] = {}
    for bits in (16, 8, 4):
        base = bench.model(name)
        base = base if bits == 16 else quantize_experts(base, bits=bits)
        experts = next(iter(find_experts(base).values())).num_experts
        own: dict[str, Any] = {"GB": round(base.get_memory_footprint() / 1e9, 3)}
        step = TrainingStep("ESFT", base, max(1, experts // 10), bench.tokens(1, 4096), checkpointing=False)
        own |= {"training": bench.times({"ms": step}) | {"peak GB": bench.peak(step), "waits": bench.waits(step)}}
        del step
        bench.free()
        model = adapt(base, inference_mode=True).eval()
        model.base_model.freeze_adapter("default")
        with torch.no_grad():
            for what, rows, length in (("decoding, 1 row", 1, 1), ("decoding, 32 rows", 32, 1), ("prefill", 1, 2048)):
                tokens = bench.tokens(rows, length)

                def call(model: Any = model, tokens: torch.Tensor = tokens) -> object:
                    return model(input_ids=tokens, use_cache=False)

                own[what] = bench.times({"ms": call}) | {"waits": bench.waits(call)}
        result[f"{bits} bits"] = own
        del model, base
        bench.free()
    return result


def whole_model(bench: Bench) -> dict[str, Any]:
    """Qwen3-30B-A3B with random weights and all 48 layers: training steps of 4,096 tokens in bf16 and NF4."""
    sizes: dict[str, Any] = {"num_hidden_layers": 48, "moe_intermediate_size": 768, "num_experts": 128}
    sizes |= {"head_dim": 128, "num_key_value_heads": 4}
    if bench.is_tiny:
        sizes = {"num_hidden_layers": 2, "moe_intermediate_size": 32, "num_experts": 16, "hidden_size": 64}
        sizes |= {"vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    with torch.device(bench.device):
        config = Qwen3MoeConfig(num_experts_per_tok=8, **sizes)
        base = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    base.set_experts_implementation("grouped_mm")
    result = {"bf16, 2 experts a layer": _whole_step(bench, base, 2)}
    base = quantize_experts(base, bits=4)
    return result | {f"NF4, {trained} experts a layer": _whole_step(bench, base, trained) for trained in (2, 8)}


def _whole_step(bench: Bench, base: Qwen3MoeForCausalLM, trained: int) -> dict[str, Any]:
    bench.free()
    model = get_peft_model(
        base, ESFTConfig(target_experts={path: list(range(trained)) for path in find_experts(base)})
    )
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, tokens = torch.optim.AdamW(parameters, lr=1e-5), bench.tokens(1, 4096)
    result: dict[str, Any] = {"base GB": round(base.get_memory_footprint() / 1e9, 2)}
    result["trained parameters"] = sum(parameter.numel() for parameter in parameters)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    try:
        result |= bench.times({"ms": step}) | {"peak GB": bench.peak(step)}
    finally:
        optimizer.zero_grad()
        model.unload()
    return result


def few_rows(bench: Bench) -> dict[str, Any]:
    """Up to how many rows computing more than needed costs less than a wait: the limits of `ops/grouped_mm.py`."""
    model = adapt(bench.model("Qwen3-30B-A3B"), inference_mode=True).eval()
    limits = grouped_mm._few_rows
    result = {}
    with torch.no_grad():
        for rows in (2,) if bench.is_tiny else (1, 2, 4, 8, 16, 32, 64, 128, 256):
            tokens = bench.tokens(rows, 1)
            calls = {}
            for what, limit in (("waits", -1), ("does not wait", 10**9)):

                def call(limit: int = limit, tokens: torch.Tensor = tokens) -> None:
                    grouped_mm._few_rows = lambda *_: limit
                    try:
                        model(input_ids=tokens, use_cache=False)
                    finally:
                        grouped_mm._few_rows = limits

                calls[what] = call
            result[f"{rows} tokens"] = bench.times(calls)
    return result


def static_generate(bench: Bench) -> dict[str, Any]:
    """`generate` with a static cache, which transformers compiles with CUDA graphs by itself: milliseconds a token."""
    count = 4 if bench.is_tiny else 32
    result: dict[str, Any] = {}
    for rows in (2,) if bench.is_tiny else (2, 64):
        for what in ("base", "ESFT"):
            torch._dynamo.reset()
            model: Any = bench.model("Qwen3-30B-A3B")
            model = adapt(model, inference_mode=True).eval() if what == "ESFT" else model
            tokens = bench.tokens(rows, 16)
            mask = torch.ones_like(tokens)

            def call(model: Any = model, tokens: Any = tokens, mask: Any = mask) -> object:
                settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
                return model.generate(
                    input_ids=tokens, attention_mask=mask, cache_implementation="static", pad_token_id=0, **settings
                )

            milliseconds = bench.times({"ms": call})["ms"]
            is_time = isinstance(milliseconds, float)
            result[f"{what}, {rows} rows"] = round(milliseconds / count, 3) if is_time else milliseconds
            bench.free()
    return result


def switching(bench: Bench) -> dict[str, Any]:
    """Switching, merging and unmerging beside a copy of the bytes; loading from a pool."""
    model = bench.model("OLMoE-1B-7B")
    adapted = adapt(model, ("first", "second"), inference_mode=True).eval()
    nbytes = (
        sum(p.nbytes for name, p in adapted.named_parameters() if ".esft_" in name and name.endswith("first")) // 2
    )
    source = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)

    def switch() -> None:
        for name in ("second", "first"):
            adapted.base_model.set_adapter(name, inference_mode=True)

    def merge() -> None:
        adapted.merge_adapter(["first"])
        adapted.unmerge_adapter()

    calls = {"switch twice": switch, "merge and unmerge": merge, "a copy": lambda: target.copy_(source)}
    result = bench.times(calls) | {"MB": nbytes / 1e6, "waits of merging": bench.waits(merge)}
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, selected_adapters=["second"])
        pool = AdapterPool(adapted, device_bytes=4 * nbytes)
        pool.add("pooled", Path(folder) / "second")
        pool.get("pooled")

        def reload() -> None:
            with pool._condition:
                pool._delete("pooled")
            pool.get("pooled")

        result |= bench.times({"load from host memory": reload})
        pool.close()
    return result


def parts(is_tiny: bool) -> list[tuple[str, float, Callable[[Bench], Any]]]:
    """What is run, and how many seconds each may take on an H100."""
    names = ["OLMoE-1B-7B"] if is_tiny else list(SIZES)
    found: list[tuple[str, float, Callable[[Bench], Any]]] = [
        ("values beside the CPU's", 30, values),
        ("torch's grouped product", 15, operators),
    ]
    for name in names:
        found.append((f"layer step, {name}, 4096 tokens", 20, lambda b, n=name: layer(b, n, 4096)))
    found.append(("limits of few rows", 15, few_rows))
    for name in names:
        call = lambda b, n=name: training(b, n, 4096, n == "Qwen3-30B-A3B")  # noqa: E731
        found.append((f"training step, {name}, 4096 tokens", 40, call))
    for rows in (2,) if is_tiny else (1, 8, 32, 64, 256):
        found.append(
            (f"decoding, Qwen3-30B-A3B, {rows} rows", 15, lambda b, r=rows: inference(b, "Qwen3-30B-A3B", r, 1))
        )
    found += [
        ("prefill, OLMoE-1B-7B, 2 x 2048", 15, lambda b: inference(b, "OLMoE-1B-7B", 2, 2048)),
        ("quantised base, DeepSeek-V2-Lite", 40, lambda b: quantised(b, "DeepSeek-V2-Lite")),
        ("all of Qwen3-30B-A3B", 60, whole_model),
        ("switching, merging, pool", 20, switching),
        ("generate with a static cache", 90, static_generate),
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU. --tiny runs everything on the CPU, which measures nothing")
    bench, started = Bench(arguments.tiny), time.monotonic()
    card = "CPU, tiny sizes" if bench.is_tiny else torch.cuda.get_device_name()
    record: dict[str, Any] = {"card": card, "versions": versions(), "parts": {}}
    for name, seconds, part in parts(bench.is_tiny):
        left = 60 * arguments.minutes - (time.monotonic() - started)
        try:
            record["parts"][name] = part(bench) if left >= seconds else f"left out, {left:.0f} s were left"
        except Exception as error:
            record["parts"][name] = _shortened(error)
        bench.free()
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {json.dumps(record['parts'][name])}", flush=True)


def _shortened(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    main()
