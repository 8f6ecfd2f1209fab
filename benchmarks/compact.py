"""Bytes and loss of each form of an adapter file, on the embedded model and its tasks.

    python benchmarks/compact.py [TASK ...]

For each task an adapter is trained for 200 steps, once over the fp32 base and published for the bf16 base.
Reported are bytes for each trained weight, the task's metrics on held-out examples, the loss on general text, and the
share of effective weights that equal those of the fp32 deltas bit for bit.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_moe"))

from peft_esft import ESFTConfig, ESFTLayer, score_experts
from peft_esft.interchange import compact
from peft_esft.ops.encodings import FORMS

from reporting import versions, write_results
from tasks import FOLDER, TASKS, batches, evaluate, general_loss, load_base, load_task, train


def effective(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The effective rows, by layer and weight."""
    return {
        f"{layer.path}.{name}": layer.effective_rows(name, ["default"])
        for layer in model.modules()
        if isinstance(layer, ESFTLayer)
        for name in layer.weight_names
    }


def equal_share(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    same = sum(int((left[key] == right[key]).sum()) for key in left)
    return 100 * same / sum(value.numel() for value in left.values())


@torch.no_grad()
def measure(task: str, folder: Path) -> list[dict[str, object]]:
    """A row for the base and one for each form."""
    base, tokenizer = load_base()
    training, held_out = load_task(task, "train"), load_task(task, "eval")
    scores = score_experts(base, batches(training, tokenizer), max_tokens=32_768, progress=False)
    config = ESFTConfig.from_scores(scores, metric="token", top_p=0.2, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.enable_grad():
        train(model, tokenizer, training)
    model.save_pretrained(folder / "delta")
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    published = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.bfloat16)
    rows: list[dict[str, object]] = []

    def add(form: str, size: object, model: torch.nn.Module, share: object) -> None:
        results = evaluate(model, tokenizer, held_out)
        general = general_loss(model, tokenizer)
        rows.append(
            {
                "task": task,
                "form": form,
                "bytes per weight": size,
                "exact (%)": 100 * results["exact"],
                "tokens (%)": 100 * results["tokens"],
                "loss": results["loss"],
                "general loss": sum(general.values()) / len(general),
                "equal weights (%)": share,
            }
        )

    add("none (base)", 0.0, published, "")
    reference: dict[str, torch.Tensor] = {}
    for form in FORMS:
        if form != "delta":
            compact(folder / "delta", folder / form, form=form, base=published)
        adapted = PeftModel.from_pretrained(copy.deepcopy(published), str(folder / form)).eval()
        own = effective(adapted)
        reference = reference or own
        size = (folder / form / "adapter_model.safetensors").stat().st_size / weights
        add(form, size, adapted, equal_share(own, reference))
    return rows


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for task in sys.argv[1:] or TASKS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(task, Path(folder))
    setting = (
        "The embedded model in bf16; adapters (experts that take 20 % of the choices, 200 steps "
        "over the fp32 base). Rows of 64 and 192 weights share a scale; those of a large model are ten times as "
        "long."
    )
    write_results("compact", "Forms of an adapter file", setting, rows, versions())


if __name__ == "__main__":
    main()
