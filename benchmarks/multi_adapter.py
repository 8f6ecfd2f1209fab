"""Many adapters in one batch, over the base alone, over a bound, and over other ways to serve the same requests.

    python benchmarks/multi_adapter.py [--busy]

All take turns in one process on the same inputs; reported are the ratio of the fastest calls and, in brackets, the
median of the ratios within a round. The bound is the base with each layer's experts and all adapters' rows in one
fused module of transformers, in which every token is sent to its own rows beforehand.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeForCausalLM

from peft_esft import ESFTConfig, ESFTLayer, find_experts
from peft_esft.tuner.layers.held import mixed_rows

from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results
from scoring import EXPERTS, build_model


TRAINED = 4  # of 64 experts in each layer, others for each adapter
COUNTS = (1, 2, 5, 10, 20)
MERGED_COUNTS = (1, 2, 5)  # separate models are too large for more
CASES = {"prefill 40 x 128": (128, 11), "decode 40 x 1": (1, 61)}
SAMPLES = 40


class OneGroupedMatmul(nn.Module):
    """Experts and all adapters' rows in one module, with the slots of each token's adapter."""

    def __init__(self, layer: ESFTLayer, adapters: list[str]) -> None:
        super().__init__()
        base = layer.get_base_layer()
        mixed = mixed_rows(layer, adapters)
        assert mixed is not None
        self.experts = copy.copy(base)
        self.experts._parameters = {}
        for name in layer.weight_names:
            self.experts._parameters[name] = nn.Parameter(torch.cat([getattr(base, name), mixed.rows[name]]))
        self.experts.num_experts = len(getattr(self.experts, layer.weight_names[0]))
        self.slots = mixed.slots
        self.adapter_of_sample = torch.arange(SAMPLES) % len(adapters)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        adapters = self.adapter_of_sample.repeat_interleave(hidden_states.shape[0] // SAMPLES)
        return self.experts(hidden_states, self.slots[adapters[:, None], top_k_index], top_k_weights)


def with_adapters(base: OlmoeForCausalLM, count: int) -> PeftModel:
    """Adapters of different random experts, for inference only."""
    generator = torch.Generator().manual_seed(0)
    model = None
    for number in range(count):
        chosen = {path: torch.randperm(EXPERTS, generator=generator)[:TRAINED].tolist() for path in find_experts(base)}
        config = ESFTConfig(target_experts=chosen, inference_mode=True, init_weights=False)
        if model is None:
            model = get_peft_model(base, config, adapter_name="task0")
        else:
            model.add_adapter(f"task{number}", config)
        model.base_model.freeze_adapter(f"task{number}")
    assert model is not None
    return model.eval()


def bounded(model: PeftModel, adapters: list[str]) -> OlmoeForCausalLM:
    """The bound's model; its attention and embeddings are the base's."""
    memo: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    bound = copy.deepcopy(model.get_base_model(), memo)
    for name, layer in list(model.get_base_model().named_modules()):
        if isinstance(layer, ESFTLayer):
            bound.set_submodule(name, OneGroupedMatmul(layer, adapters))
    bound.set_experts_implementation("grouped_mm")
    return bound


def live_bytes() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_memory(count: int, dtype: torch.dtype) -> float:
    """Base and adapters over the base and the adapters' rows."""
    before = live_bytes()
    base = build_model().to(dtype)
    of_base = live_bytes() - before
    rows = sum(TRAINED * container.parameters_per_expert for container in find_experts(base).values())
    model = with_adapters(base, count)
    with torch.no_grad():
        model(input_ids=torch.zeros(count, 1, dtype=torch.int64), adapter_names=list(model.peft_config))
    return (live_bytes() - before) / (of_base + count * rows * dtype.itemsize)


def calls_of(base: OlmoeForCausalLM, model: PeftModel, tokens: Tensor) -> dict[str, Callable[[], object]]:
    names = list(model.peft_config)
    count = len(names)
    bound = bounded(model, names)
    adapter_names = [names[sample % count] for sample in range(SAMPLES)]

    def swapping() -> None:
        for number, name in enumerate(names):
            model.base_model.set_adapter(name, inference_mode=True)
            model(input_ids=tokens[number::count])

    calls: dict[str, Callable[[], object]] = {
        "base": lambda: base(input_ids=tokens),
        "bound": lambda: bound(input_ids=tokens),
        "mixed": lambda: model(input_ids=tokens, adapter_names=adapter_names),
        "switching": swapping,
    }
    if count in MERGED_COUNTS:
        merged = []
        for name in names:
            model.base_model.set_adapter(name, inference_mode=True)
            merged.append(copy.deepcopy(model).merge_and_unload())

        def separate() -> None:
            for number, own in enumerate(merged):
                own(input_ids=tokens[number::count])

        calls["separate models"] = separate
    torch.testing.assert_close(calls["mixed"]().logits, calls["bound"]().logits, rtol=0.1, atol=0.1)
    return calls


@torch.inference_mode()
def measure(count: int, case: str, dtype: torch.dtype, rounds_divisor: int) -> dict[str, object]:
    length, rounds = CASES[case]
    with torch.inference_mode(False), torch.no_grad():
        base = build_model().to(dtype)
        model = with_adapters(copy.deepcopy(base), count)
        calls = calls_of(base, model, torch.randint(4096, (SAMPLES, length)))
    times = time_in_turns(calls, max(3, rounds // rounds_divisor))
    result: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "case": case, "adapters": count}
    result["over the base"] = times.ratio("mixed", "base")
    result["over the bound"] = times.ratio("mixed", "bound")
    result["switching over mixed"] = times.ratio("switching", "mixed")
    result["separate models over mixed"] = (
        times.ratio("separate models", "mixed") if "separate models" in calls else ""
    )
    result["memory over base + rows"] = measure_memory(count, dtype)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--faster", type=int, default=1, help="divides the number of rounds")
    add_clock_arguments(parser)
    arguments = parser.parse_args()
    set_clock(arguments)
    rows = [
        measure(count, case, dtype, arguments.faster)
        for dtype in (torch.float32, torch.bfloat16)
        for case in CASES
        for count in (arguments.counts if dtype == torch.float32 else arguments.counts[-1:])
    ]
    setting = (
        f"OLMoE-like model of benchmarks/scoring.py, {SAMPLES} samples in one batch, {TRAINED} of {EXPERTS} experts "
        "of each layer for each adapter, chosen at random. bound: experts and rows in one fused module of "
        "transformers (grouped_mm). switching: set_adapter and a part of the batch for each adapter. separate "
        "models: a merged model for each adapter. memory: all tensors after a mixed call, over the base's and the "
        "adapters' rows."
    )
    write_results("multi_adapter", "Many adapters in one batch", setting, rows, versions())


if __name__ == "__main__":
    main()
