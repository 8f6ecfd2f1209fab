"""Whole calls with an adapter over the same calls of the base: training steps, generation, mixed batches, switches.

    python benchmarks/generating.py [--busy]

All take turns in one process on the same inputs; reported are the ratio of the fastest calls and, in brackets, the
median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, OlmoeForCausalLM

from peft_esft import ESFTConfig, find_experts

from reporting import add_clock_arguments, set_clock, time_in_turns, versions, write_results
from scoring import build_model


TRAINED = 8  # of 64 experts in each layer
NEW_TOKENS = 24
ROUNDS = 11


def adapted(base: OlmoeForCausalLM, *names: str, frozen: bool = False) -> PeftModel:
    """A copy of the base with adapters of different experts."""
    model = None
    for place, name in enumerate(names):
        selection = {path: list(range(place, 64, 64 // TRAINED)) for path in find_experts(base)}
        config = ESFTConfig(target_experts=selection, init_weights=False, inference_mode=frozen, task_type="CAUSAL_LM")
        if model is None:
            model = get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        if frozen:
            model.base_model.freeze_adapter(name)
    assert model is not None
    return model


def training_step(model: torch.nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def measure_training(base: OlmoeForCausalLM) -> list[dict[str, object]]:
    model = adapted(base, "law").train()
    frozen = base.train()
    step, tokens = training_step(model, torch.randint(4096, (2, 512))), torch.randint(4096, (2, 512))

    def base_forward() -> None:
        with torch.no_grad():
            frozen(input_ids=tokens)

    times = time_in_turns({"base": base_forward, "step": step}, ROUNDS)
    return [{"call": "training step, 2 x 512, over the base's forward", "time": times.ratio("step", "base")}]


def measure_inference(base: OlmoeForCausalLM, frozen: bool) -> list[dict[str, object]]:
    model, base = adapted(base, "law", "intent", frozen=frozen).eval(), base.eval()
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=1
    )
    one, eight = torch.randint(2, 4096, (1, 16)), torch.randint(2, 4096, (8, 16))
    names = ["law", "intent"] * 4
    long, step = torch.randint(4096, (1, 1024)), torch.randint(4096, (1, 1))
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward, 1 x 1,024": (lambda: base(input_ids=long), lambda: model(input_ids=long)),
        "forward, 1 x 1": (lambda: base(input_ids=step), lambda: model(input_ids=step)),
        f"generate, 1 x {NEW_TOKENS}": (
            lambda: base.generate(one, generation_config=settings),
            lambda: model.generate(input_ids=one, generation_config=settings),
        ),
        f"generate, 8 x {NEW_TOKENS}": (
            lambda: base.generate(eight, generation_config=settings),
            lambda: model.generate(input_ids=eight, generation_config=settings),
        ),
        f"generate, 8 x {NEW_TOKENS}, two adapters in the batch": (
            lambda: base.generate(eight, generation_config=settings),
            lambda: model.generate(input_ids=eight, generation_config=settings, adapter_names=names),
        ),
    }
    rows: list[dict[str, object]] = []
    form = "frozen" if frozen else "deltas"
    for name, (plain, own) in pairs.items():
        rounds = 101 if name == "forward, 1 x 1" else ROUNDS
        times = time_in_turns({"base": plain, "own": own}, rounds)
        rows.append({"call": f"{name}, {form}", "time": times.ratio("own", "base")})
    switches = iter(["law", "intent"] * 1000)
    times = time_in_turns({"switch": lambda: model.set_adapter(next(switches))}, 201)
    rows.append({"call": f"set_adapter, {form}", "time": f"{1000 * times.medians()['switch']:.3f} ms"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clock_arguments(parser)
    set_clock(parser.parse_args())
    base = build_model()
    rows = measure_training(base)
    with torch.inference_mode():
        rows += measure_inference(base, frozen=False) + measure_inference(base, frozen=True)
    setting = (
        f"OLMoE-like model of benchmarks/scoring.py in fp32, {TRAINED} of 64 experts in each layer adapted, base = 1."
    )
    write_results("generating", "Whole calls with an adapter over the base's", setting, rows, versions())


if __name__ == "__main__":
    main()
