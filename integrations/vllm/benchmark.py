"""Tokens per second of base, merged model, one adapter, 4 and 16 adapters mixed in a batch, and vLLM's own LoRA.

usage: benchmark.py [--rounds 7] [--hidden 512]      (in vLLM's environment)

A random OLMoE is built, and adapters of 8 of 64 experts per layer. Every engine has its own process and waits while
another one is measured. Each round measures all of them once, so that load from elsewhere hits all alike. CPU time
hardly depends on that load if OMP_NUM_THREADS is 1; with more threads their waiting counts too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


REQUESTS, PROMPT, NEW_TOKENS, EXPERTS, ADAPTERS = 16, 64, 32, 8, 16
ENGINES = {"plain": None, "merged": None, "slots of 4": 4, "slots of 16": 16, "LoRA": 4}
"""Engines by name, with the number of slots."""
MEASURED = [
    ("base, plain vLLM", "plain", 0),
    ("merged, plain vLLM", "merged", 0),
    ("base, 4 slots", "slots of 4", 0),
    ("1 adapter, 4 slots", "slots of 4", 1),
    ("4 adapters, 4 slots", "slots of 4", 4),
    ("16 adapters, 16 slots", "slots of 16", 16),
    ("4 LoRA adapters on the experts", "LoRA", 4),
]
"""What is measured: a label, the engine, and how many adapters a batch has."""


def build(folder: Path, hidden: int) -> None:
    """Writes a base, its adapters in both kinds, and the first adapter merged."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden // 2, "num_hidden_layers": 6, "num_experts": 64}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "num_experts_per_tok": 8}
    model = OlmoeForCausalLM(OlmoeConfig(vocab_size=4096, **sizes, **heads, eos_token_id=0, pad_token_id=0)).bfloat16()
    model.save_pretrained(folder / "plain")
    for adapter in range(ADAPTERS):
        chosen, lora, selection = {}, {}, {}
        for layer in range(6):
            path = f"model.layers.{layer}.mlp.experts"
            selection[path] = sorted(torch.randperm(64)[:EXPERTS].tolist())
            for name, shape in (("gate_up_proj", (hidden, hidden)), ("down_proj", (hidden, hidden // 2))):
                chosen[f"base_model.model.{path}.esft_{name}"] = 0.01 * torch.randn(EXPERTS, *shape)
            for expert in range(64):  # vLLM wants factors of all experts: those that are not chosen have zeros
                for name in ("gate_proj", "up_proj", "down_proj"):
                    last, first = (hidden // 2, hidden) if name == "down_proj" else (hidden, hidden // 2)
                    key = f"base_model.model.{path}.{expert}.{name}.lora"
                    scale = 0.01 * (expert in selection[path])
                    lora |= {f"{key}_A.weight": torch.randn(8, last), f"{key}_B.weight": scale * torch.randn(first, 8)}
        write(folder / "esft" / str(adapter), chosen, {"peft_type": "ESFT", "target_experts": selection})
        config = {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 8,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
        }
        write(folder / "lora" / str(adapter), lora, config)
        if adapter == 0:
            for path, ids in selection.items():
                for name in ("gate_up_proj", "down_proj"):
                    weight = model.get_parameter(f"{path}.{name}").data
                    weight[ids] = (weight[ids].float() + chosen[f"base_model.model.{path}.esft_{name}"]).bfloat16()
            model.save_pretrained(folder / "merged")


def write(folder: Path, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"storage": "delta", "rank": None}))


def serve(folder: Path, name: str) -> None:
    """One engine. Reads a number of adapters from each line, and answers with the times of a batch."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    slots, settings = ENGINES[name], {}
    if slots:
        settings = {"enable_lora": True, "max_loras": slots, "max_lora_rank": 8, "max_cpu_loras": ADAPTERS}
    if slots and name != "LoRA":
        settings["additional_config"] = {"esft": {"experts": EXPERTS}}
    llm = LLM(
        str(folder / (name if name == "merged" else "plain")), dtype="bfloat16", enforce_eager=True, max_model_len=256,
        max_num_seqs=REQUESTS, max_num_batched_tokens=2048, enable_prefix_caching=False, skip_tokenizer_init=True,
        gpu_memory_utilization=0.1, distributed_executor_backend="uni", **settings,
    )  # fmt: skip
    prompts = [[(7 * k + 3 * i) % 4000 + 1 for i in range(PROMPT)] for k in range(REQUESTS)]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    kind = "lora" if name == "LoRA" else "esft"
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        adapters = [LoRARequest(str(k % count), 1 + k % count, str(folder / kind / str(k % count))) if count else None
                    for k in range(REQUESTS)]  # fmt: skip
        begin, begin_cpu = time.perf_counter(), time.process_time()
        llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False, lora_request=adapters
        )
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        print("measured", REQUESTS * NEW_TOKENS / seconds, 1e3 * cpu_seconds / (REQUESTS * NEW_TOKENS), flush=True)


def start(folder: Path, name: str) -> subprocess.Popen[str] | None:
    """Starts an engine; None, and a line that says why, if it does not start."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    if not ENGINES[name]:
        environment["VLLM_PLUGINS"] = ""
    log = (folder / f"{name}.log").open("w")
    command = [sys.executable, __file__, "--engine", name, "--folder", str(folder)]
    engine = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    for line in engine.stdout:
        if line.strip() == "ready":
            return engine
    print(f"{name}: the engine does not start: {last_error(folder / f'{name}.log')}")
    return None


def last_error(log: Path) -> str:
    lines = log.read_text().splitlines()
    return next((line[-200:] for line in reversed(lines) if "Error" in line), "no error in its log")


def measure(engine: subprocess.Popen[str], count: int) -> tuple[float, float] | None:
    """Tokens per second, and milliseconds of CPU time per token, of one batch; None if the engine ended."""
    print(count, file=engine.stdin, flush=True)
    for line in engine.stdout:
        if line.startswith("measured"):
            return float(line.split()[1]), float(line.split()[2])
    return None


def main(rounds: int, hidden: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, hidden)
        engines = {name: start(folder, name) for name in ENGINES}
        speeds: dict[str, list[tuple[float, float]]] = {label: [] for label, name, _ in MEASURED if engines[name]}
        for turn in range(rounds + 1):
            for label, name, count in MEASURED:
                speed = measure(engines[name], count) if engines[name] else None
                if speed is None and speeds.pop(label, None) is not None:
                    print(f"{label}: the engine ended: {last_error(folder / f'{name}.log')}")
                    engines[name] = None
                elif speed and turn:  # the first round warms up and loads adapters
                    speeds[label].append(speed)
        for engine in filter(None, engines.values()):
            engine.stdin.close()
            engine.wait()
    print(f"{'':32}   tokens/s      CPU ms per token")
    print(f"{'':32}   median  best  median  least  relative to the base (least)")
    base = min(cpu for _, cpu in speeds[MEASURED[0][0]])
    for label, own in speeds.items():
        (median, best), (middle, least) = (
            (statistics.median(values), pick(values))
            for values, pick in zip(zip(*own, strict=True), (max, min), strict=True)
        )
        print(f"{label:32} {median:8.1f} {best:5.0f} {middle:7.2f} {least:6.2f}  {least / base:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    serve(options.folder, options.engine) if options.engine else main(options.rounds, options.hidden)
