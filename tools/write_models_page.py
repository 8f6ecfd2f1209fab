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

PRODUCTS = {
    "afmoe": "Trinity-Mini",
    "aria": "Aria",
    "axk1": "A.X-K1",
    "axk2": "A.X-K2",
    "bailing_hybrid": "Ling-3.0-Flash",
    "beam": "Beam-1.0-501B-A23B",
    "cohere2_moe": "Command A+",
    "dbrx": "DBRX Instruct",
    "deepseek_ocr2": "DeepSeek-OCR-2",
    "deepseek_v2": "DeepSeek-V2, DeepSeek-V2-Lite",
    "deepseek_v3": "DeepSeek-V3, DeepSeek-R1",
    "deepseek_v32": "DeepSeek-V3.2-Exp",
    "deepseek_v4": "DeepSeek-V4-Flash",
    "diffusion_gemma": "DiffusionGemma 26B-A4B",
    "doge": "Doge",
    "dots1": "dots.llm1",
    "dots3_note": "dots3-note",
    "ernie4_5_moe": "ERNIE-4.5-21B-A3B",
    "ernie4_5_vl_moe": "ERNIE-4.5-VL-28B-A3B",
    "exaone_moe": "K-EXAONE-236B-A23B",
    "flex_olmo": "FlexOlmo-7x7B",
    "flint": "Flint",
    "gemma4": "Gemma 4 (those with experts)",
    "glm4_moe": "GLM-4.5, GLM-4.6",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v_moe": "GLM-4.5V",
    "glm5_next": "GLM-5.3-Flash",
    "glm_moe_dsa": "GLM-5",
    "gpt_oss": "gpt-oss-20b, gpt-oss-120b",
    "granitemoe": "PowerMoE-3b, Granite 3 MoE",
    "granitemoe_swa": "Granite Swash 3b-a600m",
    "granitemoehybrid": "Granite 4.0 h-tiny, h-small",
    "granitemoeshared": "Granite MoE with shared experts",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "hy_v3": "Hy3-preview",
    "hy_v4": "Hy4-preview",
    "inkling": "Inkling",
    "inkling2": "Inkling-2-Small",
    "jamba": "Jamba",
    "jetmoe": "JetMoe-8b",
    "kimi_k25": "Kimi-K2.5, Kimi-K2.6",
    "kimi_linear": "Kimi-Linear-48B-A3B",
    "kolibri1": "Kolibri-1",
    "laguna": "Laguna XS.2",
    "lfm2_moe": "LFM2-8B-A1B",
    "llama4": "Llama 4 Scout, Llama 4 Maverick",
    "longcat_flash": "LongCat-Flash",
    "mellum": "Mellum2-12B-A2.5B",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minimax": "MiniMax-Text-01",
    "minimax_m2": "MiniMax-M2",
    "minimax_m3_vl": "MiniMax-M3",
    "mistral4": "Mistral Small 4",
    "mistral_large4": "Mistral Large 4",
    "mixtral": "Mixtral-8x7B, Mixtral-8x22B",
    "muse_spark": "Muse-Spark-Open",
    "nemotron_h": "Nemotron 3 Nano 30B-A3B",
    "nemotron_h_omni": "Nemotron 3 Nano Omni 30B-A3B",
    "nllb_moe": "NLLB-MoE-54b",
    "olmoe": "OLMoE-1B-7B",
    "openai_privacy_filter": "OpenAI Privacy Filter",
    "phimoe": "Phi-3.5-MoE",
    "qwen2_moe": "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    "qwen3_5_moe": "Qwen3.5-35B-A3B",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "qwen3_next": "Qwen3-Next-80B-A3B",
    "qwen3_omni_moe": "Qwen3-Omni-30B-A3B",
    "qwen3_omni_moe_talker": "Qwen3-Omni-30B-A3B (its talker)",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B",
    "qwen4_exp": "Qwen4-Exp",
    "solar_open": "Solar-Open-100B",
    "step3p7": "Step-3.7-Flash",
    "switch_transformers": "Switch Transformers",
    "unlimited_ocr": "Unlimited-OCR",
    "vitpose_backbone": "ViTPose",
    "zaya": "ZAYA1-8B",
}
"""Released models of a type, most of them as its configuration class in transformers names them."""

GATE_NOTES = {
    "beam": "a constant factor is applied after the experts",
    "cohere2_moe": "halved after the experts where shared and routed outputs are averaged",
    "deepseek_v4": "hash layers choose by the token's id; an expert may occur twice in a row and then counts twice",
    "doge": "the gate multiplies an expert's activation",
    "jetmoe": "two projections are experts modules of their own, with equal scores; attention has experts too",
    "laguna": "a constant factor is applied after the experts",
    "llama4": "the gate multiplies the expert's input, not its output",
    "longcat_flash": "experts that return their input take a share of the choices, which counts for no expert",
    "minimax_m3_vl": "a constant factor is applied after the experts",
    "nllb_moe": "transformers 5.23 runs experts 0 and 1 only, whatever the router chooses; scores count what runs",
    "openai_privacy_filter": "multiplied by the number of experts after them",
    "step3p7": "a constant factor is applied after the experts",
    "switch_transformers": "the gate is the choice's probability; a token beyond an expert's capacity is not counted",
    "vitpose_backbone": "the gate is 1: the expert of an image is an input of the model",
    "zaya": "a skipped expert is sent as expert 0 with weight 0 and does not count",
}


HEAD = """# Models

Does peft_esft support your model? Search this page for its name, or look for the `model_type` of its `config.json`.
The table has every architecture of transformers {version} that has experts. Other versions of a model are supported
if their `model_type` is listed. [Memory and several GPUs](scaling.md) says what fits on your GPU.

## What works for each kind

| kind | experts are | cost of training | several adapters in one batch | [4 or 8 bits](quantised.md) |
|---|---|---|---|---|
| *fused* | rows of shared parameters `[E, ...]` | that of the selected experts | yes | yes |
| *listed* | modules of their own | that of the selected experts | yes; not in remote code | no |
| *stacked* | in other layouts; whole parameters are written anew in each call | that of full fine-tuning | no | no |

Scoring, training, saving, loading, switching and merging work for all kinds. Exceptions: ERNIE-4.5-VL and dots3
refuse several adapters in one batch where there are images, and DiffusionGemma is quantised by `quantize_experts`
only.

## The table

Each architecture was built at tiny size from its config and tested on a CPU in fp32. `tools/write_models_page.py`
writes this page from the run.

- **trained**: three steps equal three steps of the whole model in which only the selected experts' entries change.
  Afterwards every weight of the base is bit for bit what it was.
- **saved, merged**: outputs are equal after saving and loading the adapter. The merged model, saved, loads in plain
  transformers and gives equal outputs.
- **scored**: the counts equal how often each expert runs.
- **sum of gates**: what multiplies a token's experts, summed; the range over tokens and layers, on random weights.
  Where it is 1, the router renormalises.

"""


def main() -> None:
    results = run_tests()
    rows = [describe(name, results[name]) for name in sorted({*zoo.model_types(), *zoo.VARIANTS})]
    columns = ["models", "`model_type`", "kind", *COLUMNS.values(), "experts' weights", "sum of gates", "note"]
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
        PRODUCTS[family],
        f"`{family}`",
        ", ".join(kinds),
        *("yes" if outcomes.get(test) == "passed" else "no" for test in COLUMNS),
        ", ".join(f"`{name}`" for name in weights),
        gate_sums(model, containers),
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
