"""Adapters in an engine give the tokens that the library gives, alone and mixed; what is wrong is refused."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from conftest import Library, answer, engine, expected_answers
from peft_esft_vllm.swap import swap
from vllm.lora.request import LoRARequest


BASES = ("olmoe", "qwen3_moe", "deepseek_v2", "mixtral")
REFUSED = {
    "lora": "adapter of type LORA.*serves ESFT's alone",
    "wide": "trains 9 experts of .*room for 8",
    "whole": "train_non_expert_modules.*peft-esft merge",
    "broken": "not a whole safetensors file",
    "absent": "No adapter found",
}
"""Adapters in `library.folder / "refused"`, and what is said of them."""


def requests_of(library: Library, base: str, names: str) -> dict[str, LoRARequest | None]:
    return {"base": None} | {
        name: LoRARequest(name, number, library.adapter(base, name)) for number, name in enumerate(names, 1)
    }


def check(llm: Any, library: Library, base: str, requests: dict[str, Any]) -> int:
    """Asks all prompts of all adapters in one call; returns how many prompt tokens came from the cache."""
    jobs = expected_answers(library, base, list(requests))
    found, cached = answer(llm, [prompt for prompt, _, _ in jobs], [requests[name] for _, name, _ in jobs])
    assert [(name, tokens) for (_, name, _), tokens in zip(jobs, found, strict=True)] == [job[1:] for job in jobs]
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
        check(llm, library, base, requests_of(library, base, "ab"))
        requests = requests_of(library, base, "abc")  # c is loaded at run time
        check(llm, library, base, requests)
        assert llm.collective_rpc("probe_mixed") == [4]
        assert check(llm, library, base, requests) > 0  # from the prefix cache
        assert llm.collective_rpc("probe_base") == before
        if base == "olmoe":
            llm.collective_rpc("probe_send_all_to_slot", args=(1,))
            llm.reset_prefix_cache()
            with pytest.raises(AssertionError):
                check(llm, library, base, requests)


def test_tensor_parallelism_gives_the_same_tokens(library):
    settings = {"enable_lora": True, "max_loras": 3, "additional_config": {"esft": {"experts": 8}}}
    with engine(library.folder / "bases" / "olmoe", tensor_parallel_size=2, **settings) as llm:
        check(llm, library, "olmoe", requests_of(library, "olmoe", "abc"))


def test_more_adapters_than_slots_and_wrong_ones_among_them(library, tmp_path):
    base, requests = "olmoe", requests_of(library, "olmoe", "abcd")
    folders = [library.adapter(base, name) for name in "abcd"]
    shutil.copytree(library.adapter(base, "a"), tmp_path / "retrained")
    settings = {
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 3,
        "max_num_batched_tokens": 32,  # prompts are cut into several steps
        "additional_config": {"esft": {"adapters": folders}},
    }
    with engine(library.folder / "bases" / base, **settings) as llm:
        before = llm.collective_rpc("probe_base")
        widths = [[64 + 2 * width for width in (3, 3, 8, 4)]]  # each layer has room for the widest adapter there
        assert llm.collective_rpc("probe_shapes") == widths
        check(llm, library, base, requests)

        add = llm.llm_engine.add_lora
        for reason, words in REFUSED.items():
            wrong = LoRARequest(reason, 90, str(library.folder / "refused" / reason))
            with pytest.raises(Exception, match=words.replace("room for 8", "room for 3")):
                add(wrong)
            if reason not in ("broken", "absent"):  # what a request's config says is known before it is scheduled
                with pytest.raises(Exception, match=words.replace("room for 8", "room for 3")):
                    answer(llm, [[5]], [wrong])
        with pytest.raises(ValueError, match=r"give .* a number of its own"):
            answer(llm, [[5]], [LoRARequest("b", 1, library.adapter(base, "b"))])

        retrained = LoRARequest("retrained", 50, str(tmp_path / "retrained"))
        assert add(retrained)
        assert add(LoRARequest("retrained", 50, str(tmp_path / "retrained"), load_inplace=True))  # the same weights
        shutil.rmtree(tmp_path / "retrained")
        shutil.copytree(library.adapter(base, "b"), tmp_path / "retrained")
        for number, in_place in ((50, True), (51, False)):
            with pytest.raises(Exception, match="loaded with other weights before"):
                add(LoRARequest("retrained", number, str(tmp_path / "retrained"), load_inplace=in_place))

        check(llm, library, base, requests)
        assert llm.collective_rpc("probe_base") == before


def test_one_adapter_at_a_time_is_swapped_in_place(library):
    base, expected = "olmoe", library.expected["olmoe"]
    prompts = expected["prompts"]
    with engine(library.folder / "bases" / base) as llm:
        before = llm.collective_rpc("probe_base")
        for name in ("base", "a", "d", "base", "b", "c"):
            swap(llm, None if name == "base" else library.adapter(base, name))
            assert answer(llm, prompts, [None] * 5)[0] == expected[name]
        with pytest.raises(Exception, match="adapter of type LORA"):
            swap(llm, str(library.folder / "refused" / "lora"))
        assert answer(llm, prompts, [None] * 5)[0] == expected["c"]
        swap(llm, None)
        assert llm.collective_rpc("probe_base") == before
        assert answer(llm, prompts, [None] * 5)[0] == expected["base"]
        # Keys and values of the weights before the swap are not used again, though they are still there.
        long = [(2 * prompts[3])[:110]]
        answer(llm, long, [None])
        llm.collective_rpc("esft_swap", args=(library.adapter(base, "a"),))
        assert answer(llm, long, [None])[1] == 96
        swap(llm, library.adapter(base, "a"))
        assert answer(llm, long, [None])[1] == 0


def test_a_merged_model_needs_no_plugin(library, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    expected = library.expected["qwen3_moe"]
    with engine(library.folder / "merged", worker_extension_cls="") as llm:
        assert answer(llm, expected["prompts"], [None] * 5)[0] == expected["b"]


@pytest.mark.parametrize(
    ("base", "settings", "words"),
    [
        ("gpt_oss", {"dtype": "bfloat16"}, "cannot change experts of class GptOssRoutedExperts"),
        (
            "olmoe",
            {"tensor_parallel_size": 2, "enable_expert_parallel": True},
            "cannot be served with expert parallelism",
        ),
    ],
)
def test_engines_that_cannot_serve_adapters_do_not_start(library, capfd, base, settings, words):
    settings |= {"enable_lora": True, "additional_config": {"esft": {"experts": 8}}}
    with pytest.raises(Exception, match=r"."), engine(library.folder / "bases" / base, **settings):
        pass
    assert words in "".join(capfd.readouterr())
