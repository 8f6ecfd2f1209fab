"""Switching, merging and loading adapters.

    python benchmarks/swap.py [--rounds 21] [--busy]

Switching is a matter of bookkeeping and is given in milliseconds for 26 layers; the rest as ratios to plain copies of
what has to move (merging keeps the rows that it replaces, so two copies of the adapter's rows; unmerging one; swapping
merged adapters three), or to reading the file into tensors, in turns in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import OlmoeForCausalLM

from peft_esft import ESFTConfig
from peft_esft.tuner.layers.layer import ESFTLayer

from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results
from scoring import build_model
from ways import selection_of


TRAINED = 8  # of 64 experts in each layer


def deep_model() -> OlmoeForCausalLM:
    """26 layers, as DeepSeek-V2-Lite has with experts; small ones, since a switch moves no weight."""
    return build_model(
        hidden_size=64, intermediate_size=32, num_hidden_layers=26, num_attention_heads=4, vocab_size=256
    )


def with_adapters(base: OlmoeForCausalLM) -> PeftModel:
    """Two inference adapters, of different experts."""
    selection = selection_of(base, TRAINED)
    other = {path: [expert + 1 for expert in ids] for path, ids in selection.items()}
    configs = [ESFTConfig(target_experts=t, inference_mode=True, init_weights=False) for t in (selection, other)]
    model = get_peft_model(base, configs[0], adapter_name="a")
    model.add_adapter("b", configs[1])
    return model


def measure_switching(rounds: int) -> dict[str, object]:
    model = with_adapters(deep_model())
    names = iter(["a", "b"] * (rounds + 1))
    times = time_in_turns({"switch": lambda: model.base_model.set_adapter(next(names), inference_mode=True)}, rounds)
    shown = f"{1e3 * times.minima()['switch']:.2f} ms ({1e3 * times.medians()['switch']:.2f} ms)"
    return {"operation": "switch between two adapters of 26 layers", "over": "", "ratio or time": shown}


def measure_merging(base: OlmoeForCausalLM, rounds: int) -> list[dict[str, object]]:
    model = with_adapters(base)
    layers = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    sources, targets = [], []
    for layer in layers:
        for name in layer.weight_names:
            weight = getattr(layer.get_base_layer(), name)
            sources.append(torch.randn(TRAINED, *weight.shape[1:]))
            targets.append(torch.empty_like(sources[-1]))

    def copies(number: int) -> Callable[[], None]:
        def copy_rows() -> None:
            for _ in range(number):
                for source, target in zip(sources, targets, strict=True):
                    target.copy_(source)

        return copy_rows

    def merge(name: str) -> None:
        model.base_model.merge_adapter([name])

    def swap() -> None:
        model.base_model.unmerge_adapter()
        merge("b")

    def swap_back() -> None:
        model.base_model.unmerge_adapter()
        merge("a")

    # Called in this order each time, so that each finds the state that it needs.
    order = {
        "copy 1": copies(1),
        "copy 2": copies(2),
        "copy 3": copies(3),
        "merge": lambda: merge("a"),
        "swap": swap,
        "swap back": swap_back,
        "unmerge": model.base_model.unmerge_adapter,
    }
    times = time_in_turns(order, rounds, turn_round=False)
    moved = {"merge": "copy 2", "unmerge": "copy 1", "swap": "copy 3"}
    size = sum(source.nbytes for source in sources) / 1e6
    return [
        {
            "operation": f"{name}, {size:.0f} MB",
            "over": f"{other[-1]} copies of the rows",
            "ratio or time": times.ratio(name, other),
        }
        for name, other in moved.items()
    ]


def wide_model() -> OlmoeForCausalLM:
    """Experts of 6.3 MB."""
    return build_model(hidden_size=1024, intermediate_size=512)


def measure_loading(base: OlmoeForCausalLM, rounds: int) -> dict[str, object]:
    model = with_adapters(base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["a"])
        file = Path(folder) / "a" / "adapter_model.safetensors"

        def load() -> None:
            model.load_adapter(file.parent, adapter_name="c", low_cpu_mem_usage=True)
            # Both only map the file into memory until its tensors are used.
            for name, parameter in model.named_parameters():
                if name.endswith(".c"):
                    parameter.data.clone()

        def read() -> None:
            for tensor in load_file(file).values():
                tensor.clone()

        calls = {"read": read, "load": load, "delete": lambda: model.delete_adapter("c")}
        times = time_in_turns(calls, rounds, turn_round=False)
        size = file.stat().st_size
    return {
        "operation": f"load_adapter, {size / 1e6:.0f} MB",
        "over": "reading the file into tensors",
        "ratio or time": times.ratio("load", "read"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    rows = [
        measure_switching(arguments.rounds),
        *measure_merging(build_model(), arguments.rounds),
        *measure_merging(wide_model(), arguments.rounds),
        measure_loading(build_model(), arguments.rounds),
        measure_loading(wide_model(), arguments.rounds),
    ]
    write_results(
        "swap",
        "Switching, merging and loading adapters",
        f"OLMoE-like models, fp32, {TRAINED} of 64 experts in each layer. Ratios of minima, medians of the ratios in "
        "brackets. swap: unmerge one adapter and merge another.",
        rows,
        versions(),
    )


if __name__ == "__main__":
    main()
