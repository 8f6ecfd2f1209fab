"""What is learned over experts in few bits, beside what one would do without them.

    python benchmarks/quantised_quality.py [--bases olmoe deepseek] [--tasks TASK ...] [--seeds 3] [--steps 60]

Trains on the embedded models, one seed of everything before the next seed. Results are written after each run, and a
call leaves out the runs that there are already. `--publish` only writes the tables.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from statistics import mean

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel


sys.path.insert(0, str(Path(__file__).parent / "paper"))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_moe"))

from peft_esft import ESFTConfig, quantize_experts, score_experts

from methods import ATTENTION, RANK
from reporting import RESULTS, versions, write_results
from store import Record, Store
from tasks import BASES, TASKS, batches, endless_batches, evaluate, load_base, load_general, load_task


Experts = dict[str, list[int]]
LEARNING_RATES = {"LoRA, nf4": 3e-3, "full, plain": 3e-4}
"""Of full fine-tuning and LoRA; 3e-3 for ESFT. The comparison in `paper/` chose these for most of its tasks."""
WAYS = ("plain", "int8", "nf4", "nf4, kept", "LoRA, nf4", "full, plain")
WINDOWS = 24
"""Of general text for each domain."""
FILE = RESULTS / "quantised_quality.jsonl"


def base_in(name: str, form: str, experts: Experts) -> PreTrainedModel:
    """An embedded model in fp32, whose experts are in a form: "plain", "int8", "nf4" or "nf4, kept"."""
    model, _ = load_base(name)
    if form == "plain":
        return model
    kept = experts if form.endswith("kept") else None
    return quantize_experts(model, bits=8 if form == "int8" else 4, keep=kept)


def form_of(way: str) -> str:
    """The form of the base of a way to train."""
    return way.rpartition(", ")[2] if way.startswith(("LoRA", "full")) else way


def prepared(name: str, way: str, experts: Experts) -> nn.Module:
    """The model to train."""
    model = base_in(name, form_of(way), experts)
    if way.startswith("full"):
        return model.requires_grad_(True)
    if way.startswith("LoRA"):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION, task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    return get_peft_model(model, ESFTConfig(target_experts=experts, task_type="CAUSAL_LM"))


class Bench:
    """What all runs on an embedded model and a task share.

    Args:
        name: of the model, a key of `BASES`.
        task: one of `TASKS`.
    """

    def __init__(self, name: str, task: str) -> None:
        self.name = name
        base, self.tokenizer = load_base(name)
        self.training, self.held_out = load_task(task, "train"), load_task(task, "eval")
        scores = score_experts(base, batches(self.training, self.tokenizer), max_tokens=32_768, progress=False)
        self.experts = ESFTConfig.from_scores(scores, metric="token", top_p=0.2).target_experts

    def other_text(self, model: nn.Module) -> float:
        """Nats per token on general text, the mean over its domains."""
        windows = load_general().values()
        return mean(evaluate(model, self.tokenizer, [("", w) for w in own[:WINDOWS]])["loss"] for own in windows)

    def base(self, way: str) -> Record:
        """What the base of a way gives before training."""
        model = base_in(self.name, form_of(way), self.experts)
        return {"loss": evaluate(model, self.tokenizer, self.held_out)["loss"], "other": self.other_text(model)}

    def run(self, way: str, seed: int, steps: int) -> Record:
        """Trains, and measures what came of it."""
        torch.manual_seed(seed)
        model = prepared(self.name, way, self.experts).train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], LEARNING_RATES.get(way, 3e-3)
        )
        for batch in islice(endless_batches(self.training, self.tokenizer, seed=seed), steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found = evaluate(model.eval(), self.tokenizer, self.held_out)
        record = {"loss": found["loss"], "exact": found["exact"], "other": self.other_text(model)}
        if form_of(way) != "plain":
            record["merged into plain"] = self._over_plain(model)
        return record

    def _over_plain(self, model: PeftModel) -> float:
        """The loss of the adapter over the plain base, which is that of a merge into the plain checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            over_plain = PeftModel.from_pretrained(base_in(self.name, "plain", {}), folder).eval()
        return float(evaluate(over_plain, self.tokenizer, self.held_out)["loss"])


def fill(store: Store, bases: list[str], tasks: list[str], seeds: int, steps: int) -> None:
    """Carries out the runs that are not in a store."""
    benches: dict[tuple[str, str], Bench] = {}
    for seed, task, name, way in product(range(seeds), tasks, bases, WAYS):
        key = {"model": name, "task": task, "way": way, "steps": steps}
        if store.select(**key, seed=seed):
            continue
        if (name, task) not in benches:
            benches[name, task] = Bench(name, task)
        own = benches[name, task]
        known = store.select(**key)
        before = known[0]["base"] if known else own.base(way)
        store.append({**key, "seed": seed, "base": before, **own.run(way, seed, steps)})
        print(store.records[-1], flush=True)


def table(store: Store, steps: int) -> Iterator[dict[str, object]]:
    """A row for each model, task and way, with the means over the seeds and, in brackets, their range."""
    for name, task, way in product(BASES, TASKS, WAYS):
        records = store.select(model=name, task=task, way=way, steps=steps)
        if not records:
            continue

        def over_seeds(field: str, factor: float = 1, records: list[Record] = records) -> str:
            values = [factor * record[field] for record in records]
            return f"{mean(values):.3f} ({max(values) - min(values):.3f})"

        yield {
            "model": name,
            "task": task,
            "trained": way,
            "seeds": len(records),
            "loss": over_seeds("loss"),
            "exact (%)": over_seeds("exact", 100),
            "loss, merged into plain": over_seeds("merged into plain") if "merged into plain" in records[0] else "",
            "other text": over_seeds("other"),
            "loss, base": records[0]["base"]["loss"],
            "other text, base": records[0]["base"]["other"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--publish", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    store = Store(FILE)
    if not arguments.publish:
        fill(store, arguments.bases, arguments.tasks, arguments.seeds, arguments.steps)
    write_results(
        "quantised_quality",
        "Experts in few bits: what is learned over them",
        f"Embedded models in fp32, {arguments.steps} steps of AdamW; means over the seeds, their range in brackets. "
        "plain, int8, nf4: ESFT of the same experts (top_p 0.2, chosen on the plain base) over that form of the "
        "experts; kept: with the trained experts in full precision. LoRA: rank 8 on attention, which is in full "
        "precision. full: all weights of the plain base. Loss and exact answers on held-out examples of the task.",
        list(table(store, arguments.steps)),
        versions(),
    )


if __name__ == "__main__":
    main()
