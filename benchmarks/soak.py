"""Random requests, loads and drops in several threads, every answer checked against the single-adapter answer.

    python benchmarks/soak.py [--minutes 30]

Threads serve mixed batches, by a forward pass or by greedy generation, from a pool that has room for a third of the
adapters, while others prefetch and drop them. An answer is wrong if a logit differs by more than rounding from the one
of a model with that adapter alone, or a generated token differs. An error ends the run.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import OlmoeForCausalLM

from peft_esft import AdapterPool, ESFTConfig, find_experts

from reporting import versions, write_results
from scoring import build_model


ADAPTERS = [f"task{number}" for number in range(12)]
EXPERTS, LAYERS, SAMPLES, LENGTH, NEW_TOKENS = 32, 4, 4, 12, 6
SERVERS, DISTURBERS = 4, 2
TOLERANCE = 1e-4


def build_base() -> OlmoeForCausalLM:
    return build_model(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        vocab_size=256,
        eos_token_id=None,
    )


def write_adapters(folder: Path) -> None:
    choose = random.Random(0)
    for number, name in enumerate(["first", *ADAPTERS]):
        torch.manual_seed(number)
        base = build_base()
        paths = choose.sample(list(find_experts(base)), choose.randint(1, LAYERS))
        chosen = {path: choose.sample(range(EXPERTS), choose.randint(1, 6)) for path in paths}
        model = get_peft_model(base, ESFTConfig(target_experts=chosen, init_weights=False))
        for parameter_name, parameter in model.named_parameters():
            if ".esft_" in parameter_name:
                parameter.data.mul_(5)
        model.save_pretrained(folder / name)


class Answers:
    """What each sample is answered with each adapter alone."""

    def __init__(self, folder: Path, prompts: Tensor) -> None:
        self.prompts = prompts
        self.logits: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        for name in ["__base__", *ADAPTERS]:
            model = build_base()
            if name != "__base__":
                model = PeftModel.from_pretrained(model, folder / name)
            with torch.no_grad():
                self.logits[name] = model(input_ids=prompts).logits
                self.tokens[name] = model.generate(input_ids=prompts, max_new_tokens=NEW_TOKENS, do_sample=False)

    def wrong(self, pool: AdapterPool, names: list[str], by_generation: bool) -> list[str]:
        """Serves a batch; names whose samples were answered wrong."""
        prompts = self.prompts[: len(names)]
        with pool.using(*names), torch.no_grad():
            if by_generation:
                options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
                own = pool.model.generate(input_ids=prompts, adapter_names=names, **options)
                return [name for n, name in enumerate(names) if not torch.equal(own[n], self.tokens[name][n])]
            else:
                own = pool.model(input_ids=prompts, adapter_names=names).logits
                far = [(own[n] - self.logits[name][n]).abs().max().item() for n, name in enumerate(names)]
                return [name for name, difference in zip(names, far, strict=True) if difference > TOLERANCE]


def run(pool: AdapterPool, answers: Answers, seconds: float) -> Counter[str]:
    end = time.monotonic() + seconds
    failed = threading.Event()
    counts: list[Counter[str]] = []

    def work(number: int) -> None:
        own: Counter[str] = Counter()
        counts.append(own)
        choose = random.Random(number)
        try:
            while time.monotonic() < end and not failed.is_set():
                if number < SERVERS:
                    names = choose.choices([*ADAPTERS, "__base__"], k=choose.randint(1, SAMPLES))
                    by_generation = choose.random() < 0.2
                    own["wrong answers"] += len(answers.wrong(pool, names, by_generation))
                    own["generate" if by_generation else "forward"] += 1
                    own["answers"] += len(names)
                elif choose.random() < 0.5:
                    pool.drop(choose.choice(ADAPTERS))
                    own["drop"] += 1
                else:
                    for loading in pool.prefetch(*choose.sample(ADAPTERS, 2)):
                        loading.result()
                    own["prefetch"] += 2
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(SERVERS + DISTURBERS) as threads:
        for future in [threads.submit(work, number) for number in range(SERVERS + DISTURBERS)]:
            future.result()
    total: Counter[str] = Counter()
    for own in counts:
        total.update(own)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder)
        answers = Answers(folder, torch.randint(1, 256, (SAMPLES, LENGTH)))
        model = PeftModel.from_pretrained(build_base(), folder / "first", adapter_name="first").eval()
        sizes = {own: sum(f.stat().st_size for f in (folder / own).glob("*.safetensors")) for own in ADAPTERS}
        pool = AdapterPool(model, device_bytes=max(sum(sizes.values()) // 3, 4 * max(sizes.values())))
        for own in ADAPTERS:
            pool.add(own, folder / own)
        counts = run(pool, answers, 60 * arguments.minutes)
        found = pool.statistics()
        pool.close()
    done = {**counts, "hits": found.hits, "misses": found.misses, "evictions": found.evictions, "reads": found.reads}
    rows = [{"operation": operation, "count": count} for operation, count in done.items()]
    write_results(
        "soak",
        "Random requests, loads and drops in several threads",
        f"{arguments.minutes:g} minutes, {SERVERS} serving and {DISTURBERS} disturbing threads, {len(ADAPTERS)} "
        "adapters of random layers and experts, room for about a third of them. Right is the answer of a model with "
        "the adapter alone: logits to 1e-4, generated tokens exactly.",
        rows,
        versions(),
    )
    if counts["wrong answers"]:
        raise SystemExit(f"{counts['wrong answers']} wrong answers")


if __name__ == "__main__":
    main()
