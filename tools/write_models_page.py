"""Writes docs/models.md: every architecture of the installed transformers that has experts, and what was tested on it.

    python tools/write_models_page.py

Runs tests/moe/test_families.py and reads its results; what is said of a family's gates is measured on its tiny model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from peft_esft import find_experts  # noqa: E402

import zoo  # noqa: E402


COLUMNS = {
    "test_training_equals_masked_training_of_the_whole_model": "trained",
    "test_adapters_are_saved_loaded_and_merged_into_ordinary_checkpoints": "saved, merged",
    "test_scores_count_what_is_executed": "scored",
}

GATE_NOTES = {
    "beam": "a constant factor follows after the experts",
    "cohere2_moe": "halved after the experts where shared and routed outputs are averaged",
    "deepseek_v4": "hash layers choose by the token's id; an expert may occur twice in a row and then counts twice",
    "doge": "multiplies an expert's activation",
    "jetmoe": "two projections are containers of their own, with equal scores; attention has experts too",
    "laguna": "a constant factor follows after the experts",
    "llama4": "multiplies the expert's input, not its output",
    "longcat_flash": "experts that return their input take a share of the choices, which counts for no expert",
    "minimax_m3_vl": "a constant factor follows after the experts",
    "nllb_moe": "transformers 5.23 runs experts 0 and 1 only, whatever the router chooses; counted is what runs",
    "openai_privacy_filter": "multiplied by the number of experts after them",
    "step3p7": "a constant factor follows after the experts",
    "switch_transformers": "the probability of the one choice; a token beyond an expert's capacity counts for none",
    "vitpose_backbone": "1: the expert of an image is an input of the model",
    "zaya": "a skipped expert is sent as expert 0 with weight 0 and does not count",
}


HEAD = """# Models

Every architecture of transformers {version} that has experts, built at tiny size from its config and tested on CPU in
fp32. `tools/write_models_page.py` writes this page from the run.

- **trained**: three steps equal three steps of the whole model in which only the selected experts' entries change;
  afterwards every weight of the base is bit for bit what it was.
- **saved, merged**: outputs are equal after saving and loading the adapter; the merged model, saved, loads in plain
  transformers and gives equal outputs.
- **scored**: the counts equal how often each expert runs.
- **sum of gates**: the range, over tokens and layers, of the sum of what multiplies a token's experts, on random
  weights. Where it is 1, the router renormalises.

Kinds: *fused* experts share parameters `[E, ...]` and are trained at the cost of the selected ones; *listed* ones are
modules of their own; *stacked* ones lie in other layouts, whose whole parameters are written anew in each call: exact,
but as slow as full fine-tuning.

"""


def main() -> None:
    results = run_tests()
    rows = [describe(name, results[name]) for name in sorted({*zoo.model_types(), *zoo.VARIANTS})]
    columns = ["family", "kind", "containers", "experts' weights", "sum of gates", *COLUMNS.values(), "note"]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]
    page = HEAD.format(version=transformers.__version__) + "\n".join(table) + "\n"
    (ROOT / "docs" / "models.md").write_text(page, encoding="utf-8")
    passed = sum(all(outcome == "passed" for outcome in results[name].values()) for name in results)
    print(f"{passed} of {len(rows)} families pass everything")


def run_tests() -> dict[str, dict[str, str]]:
    """The outcome of each test for each family."""
    outcomes: dict[str, dict[str, str]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/moe/test_families.py", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        for case in ElementTree.parse(report).iter("testcase"):
            test, _, family = case.attrib["name"].rstrip("]").partition("[")
            if test in COLUMNS:
                outcomes[family][test] = "failed" if len(case) else "passed"
    return outcomes


def describe(family: str, outcomes: dict[str, str]) -> str:
    """One row of the table."""
    model = zoo.build(family)
    containers = find_experts(model)
    kinds = sorted({container.kind for container in containers.values()})
    weights = sorted({name for container in containers.values() for name in container.weight_names})
    cells = [
        family,
        ", ".join(kinds),
        str(len(containers)),
        ", ".join(f"`{name}`" for name in weights),
        gate_sums(model, containers),
        *("yes" if outcomes.get(test) == "passed" else "no" for test in COLUMNS),
        GATE_NOTES.get(family, ""),
    ]
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def gate_sums(model: Any, containers: dict[str, Any]) -> str:
    """The range of the sum of a token's gates."""
    sums: list[torch.Tensor] = []

    def hook(source: Any) -> Any:
        return lambda module, args, kwargs, result=None: sums.append(
            source.read(module, (*args, *kwargs.values()), result).top_k_weights.double().sum(-1)
        )

    for container in containers.values():
        source = container.routing
        watched = container.places[0].watched(source)
        register = watched.register_forward_hook if source.of_result else watched.register_forward_pre_hook
        register(hook(source), with_kwargs=True)
    model(**zoo.inputs_for(model))
    low, high = float(torch.cat(sums).min()), float(torch.cat(sums).max())
    return f"{low:.2f}" if high - low < 5e-3 else f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    main()
