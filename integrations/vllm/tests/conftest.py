"""Engines of vLLM beside what the library answers.

The library cannot be imported here: vLLM needs an older transformers. So `write_expected.py` runs once in the
library's environment, whose Python is `PEFT_ESFT_PYTHON`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[3]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",  # engines find probe.py there
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_MLA_DISABLE": "1",  # vLLM's CPU kernel for MLA knows one head size only
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest  # noqa: E402


PYTHON = os.environ.get("PEFT_ESFT_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "gpu_memory_utilization": 0.3,
    "block_size": 32,
    "enable_prefix_caching": True,
    "seed": 0,
}


@dataclass(frozen=True)
class Library:
    """What the library has written.

    Attributes:
        folder: holds `bases/BASE`, `adapters/BASE/ADAPTER` and `refused/REASON`.
        expected: by base: `prompts`, and by adapter, or `base`, the tokens after each prompt.
    """

    folder: Path
    expected: dict[str, dict[str, list[list[int]]]]

    def adapter(self, base: str, name: str) -> str:
        return str(self.folder / "adapters" / base / name)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("library")
    script = Path(__file__).with_name("write_expected.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([PYTHON, script, folder], check=True, env=environment, capture_output=True)
    return Library(folder, json.loads((folder / "expected.json").read_text()))


@contextmanager
def engine(base: Path, **settings: Any) -> Iterator[Any]:
    """A vLLM engine in a process of its own, with the methods of `probe.Probe` in its workers."""
    from vllm import LLM

    if "deepseek" in base.name:  # vLLM's C kernel of the rotary embedding is wrong for this number of heads
        settings["compilation_config"] = {"custom_ops": ["none"]}
    llm = LLM(str(base), **(SETTINGS | {"worker_extension_cls": "probe.Probe"} | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def expected_answers(library: Library, base: str, names: list[str]) -> list[tuple[list[int], str, list[int]]]:
    """The prompt, the adapter's name and the expected tokens of each request of a mixed batch."""
    own = library.expected[base]
    return [(prompt, name, own[name][k]) for k, prompt in enumerate(own["prompts"]) for name in names]


def answer(llm: Any, prompts: list[list[int]], adapters: list[Any]) -> tuple[list[list[int]], int]:
    """Greedy tokens of all prompts in one call, each with its LoRARequest or None; and how many tokens were cached."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(inputs, greedy, use_tqdm=False, lora_request=adapters)
    return [list(o.outputs[0].token_ids) for o in outputs], sum(o.num_cached_tokens or 0 for o in outputs)
