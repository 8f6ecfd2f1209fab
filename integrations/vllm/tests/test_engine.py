"""Adapters in an engine give the tokens that the library gives, alone and mixed."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Library, answer, engine
from vllm.lora.request import LoRARequest


BASES = ("olmoe", "qwen3_moe", "deepseek_v2", "mixtral")


def requests_of(library: Library, base: str, names: list[str]) -> dict[str, LoRARequest | None]:
    return {"base": None} | {
        name: LoRARequest(name, number, library.adapter(base, name)) for number, name in enumerate(names, 1)
    }


def mixed(llm: Any, library: Library, base: str, requests: dict[str, Any]) -> int:
    """All prompts with all adapters in one call; how many prompt tokens came from the cache."""
    expected = library.expected[base]
    jobs = [(prompt, name) for prompt in range(5) for name in requests]
    tokens, cached = answer(llm, [expected["prompts"][p] for p, _ in jobs], [requests[name] for _, name in jobs])
    wrong = [(p, name) for (p, name), found in zip(jobs, tokens, strict=True) if found != expected[name][p]]
    assert not wrong
    return cached


@pytest.mark.parametrize("base", BASES)
def test_a_mixed_batch_gives_what_the_library_gives_each_alone(library, base):
    expected = library.expected[base]
    for name in "abc":  # or the test could not fail
        assert sum(a != b for a, b in zip(expected[name], expected["base"], strict=True)) >= 4
    settings = {"enable_lora": True, "max_loras": 3, "additional_config": {"esft": {"experts": 8}}}
    with engine(library.folder / "bases" / base, **settings) as llm:
        before = llm.collective_rpc("probe_base")
        llm.collective_rpc("probe_record")
        mixed(llm, library, base, requests_of(library, base, ["a", "b"]))
        requests = requests_of(library, base, ["a", "b", "c"])  # c is loaded at run time
        mixed(llm, library, base, requests)
        assert llm.collective_rpc("probe_mixed") == [4]
        assert mixed(llm, library, base, requests) > 0  # from the prefix cache
        assert llm.collective_rpc("probe_base") == before
        if base == "olmoe":
            llm.collective_rpc("probe_send_all_to_slot", args=(1,))
            llm.reset_prefix_cache()
            with pytest.raises(AssertionError):
                mixed(llm, library, base, requests)
