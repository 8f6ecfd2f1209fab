"""Tests `AdapterPool`: adapters that are loaded and dropped, also while requests run."""

from __future__ import annotations

import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_esft import AdapterPool, ESFTConfig, find_experts
from peft_esft.interchange import compact

from families import tiny_model
from oracle import random_tokens


TOKENS = random_tokens(3, 8)
SELECTIONS = {
    "law": {0: [5, 1, 6], 1: [2]},
    "code": {1: [0, 3]},
    "math": {0: [1], 1: [1, 2, 3, 4]},
    "mail": {0: [7, 0]},
    "news": {0: [2, 3], 1: [6, 7]},
}
ROW = 4 * next(iter(find_experts(tiny_model("olmoe")).values())).parameters_per_expert  # bytes of an expert


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The adapters on disk, one of low rank and one compact, and what each answers."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, target_experts) in enumerate(SELECTIONS.items()):
        torch.manual_seed(number)
        config = ESFTConfig(target_experts=target_experts, init_weights=False, rank=2 if name == "mail" else None)
        model = get_peft_model(tiny_model("olmoe"), config)
        for parameter_name, parameter in model.named_parameters():
            if ".esft_" in parameter_name:
                parameter.data.mul_(5)
        model.save_pretrained(folder / name)
    torch.manual_seed(9)
    get_peft_model(tiny_model("olmoe"), ESFTConfig(target_experts={0: [4]})).save_pretrained(folder / "first")
    return folder


def first_model(folder):
    return PeftModel.from_pretrained(tiny_model("olmoe"), folder / "first", adapter_name="first").eval()


def answers(model, names):
    with torch.no_grad():
        return model(input_ids=TOKENS[: len(names)], adapter_names=names).logits


@pytest.fixture(scope="module")
def expected(folder):
    """The logits of each sample with each adapter, one adapter at a time."""
    model = first_model(folder)
    alone = {}
    for name in SELECTIONS:
        model.load_adapter(folder / name, adapter_name=name)
        model.set_adapter(name)
        with torch.no_grad():
            alone[name] = model(input_ids=TOKENS).logits
    with model.disable_adapter(), torch.no_grad():
        alone["__base__"] = model(input_ids=TOKENS).logits
    return alone


def make_pool(folder, device_bytes, **options):
    pool = AdapterPool(first_model(folder), device_bytes, **options)
    for name in SELECTIONS:
        pool.add(name, folder / name)
    return pool


def check(pool, names, expected):
    with pool.using(*names) as used:
        own = answers(pool.model, used)
    for number, name in enumerate(names):
        torch.testing.assert_close(own[number], expected[name][number], rtol=1e-4, atol=1e-5)


def stored_bytes(model):
    """Memory of all rows that adapters are stored as."""
    rows = (tensor for name, tensor in model.named_buffers() if "_rows." in name)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in rows}.values())


def test_the_least_recently_used_goes(folder, expected):
    pool = make_pool(folder, 9 * ROW)
    check(pool, ["law", "__base__", "mail"], expected)
    check(pool, ["code", "law"], expected)
    assert pool.statistics().resident == ("mail", "code", "law")
    check(pool, ["math"], expected)
    found = pool.statistics()
    assert found.resident == ("law", "math")
    assert (found.hits, found.misses, found.reads, found.evictions) == (1, 4, 4, 2)
    assert found.device_bytes == 9 * ROW
    assert stored_bytes(pool.model) <= 9 * ROW
    check(pool, ["mail", "law"], expected)
    assert pool.statistics().reads == 4
    assert set(pool.model.peft_config) == {"first", "law", "mail"}
    pool.close()


def test_an_adapter_takes_the_bytes_of_its_rows_and_no_more(folder):
    pool = make_pool(folder, 100 * ROW)
    for name in SELECTIONS:
        pool.get(name)
    answers(pool.model, [*SELECTIONS][:3])  # puts all rows into one tensor for each weight
    rows = sum(len(ids) for selection in SELECTIONS.values() for ids in selection.values())
    own = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for name, tensor in [*pool.model.named_parameters(), *pool.model.named_buffers()]
        if ".esft_" in name and not name.endswith("first")
    }
    assert sum(own.values()) == stored_bytes(pool.model) == rows * ROW


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["use", "use", "drop", "get"]),
            st.lists(st.sampled_from([*SELECTIONS]), min_size=1, max_size=3),
        ),
        max_size=12,
    )
)
def test_any_sequence_of_requests_is_answered_right(folder, expected, steps):
    pool = make_pool(folder, 9 * ROW, host_bytes=60_000)
    for operation, names in steps:
        if operation == "use":
            chosen = list(dict.fromkeys(names))[:2] if len(set(names)) > 2 else names
            check(pool, ["__base__" if number % 3 == 2 else name for number, name in enumerate(chosen)], expected)
        elif operation == "drop":
            pool.drop(names[0])
            assert names[0] not in pool.model.peft_config
        else:
            assert pool.get(names[0]) in pool.model.peft_config
        assert stored_bytes(pool.model) <= 9 * ROW
        assert pool.statistics().device_bytes <= 9 * ROW
    pool.close()


def serve_under_load(pool, expected, num_requests, seed):
    """Requests in three threads while a fourth one prefetches and drops; the first wrong answer raises."""
    stop = threading.Event()

    def serve(number):
        choose = random.Random(seed + number)
        for _ in range(num_requests):
            check(pool, choose.choices([*SELECTIONS, "__base__"], k=choose.randint(1, 2)), expected)

    def disturb():
        choose = random.Random(seed - 1)
        while not stop.is_set():
            pool.drop(choose.choice([*SELECTIONS]))
            for loading in pool.prefetch(*choose.sample([*SELECTIONS], 2)):
                loading.result()

    with ThreadPoolExecutor(4) as threads:
        disturbing = threads.submit(disturb)
        serving = [threads.submit(serve, number) for number in range(3)]
        try:
            for future in serving:
                future.result(timeout=300)
        finally:
            stop.set()
        disturbing.result(timeout=60)


def test_answers_are_right_while_other_threads_load_and_drop(folder, expected):
    pool = make_pool(folder, 10 * ROW, host_bytes=80_000)
    serve_under_load(pool, expected, num_requests=25, seed=1)
    found = pool.statistics()
    assert found.evictions > 0 and found.reads > 5
    pool.close()


def test_a_call_goes_on_with_what_it_began_with(folder, expected):
    """Its adapters are deleted, and their place is given to others, between two layers of its forward pass."""
    model = first_model(folder)
    for name in ("law", "code", "math"):
        model.load_adapter(folder / name, adapter_name=name)
        model.base_model.freeze_adapter(name)

    def replace(*_):
        model.delete_adapter("math")
        model.load_adapter(folder / "news", adapter_name="news")
        model.base_model.freeze_adapter("news")

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(replace)
    own = answers(model, ["math", "law", "code"])
    handle.remove()
    for number, name in enumerate(["math", "law", "code"]):
        torch.testing.assert_close(own[number], expected[name][number], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers(model, ["news"])[0], expected["news"][0], rtol=1e-4, atol=1e-5)


def test_requests_wait_for_room(folder, expected):
    pool = make_pool(folder, 6 * ROW)
    with ThreadPoolExecutor(1) as threads:
        with pool.using("law"):
            waiting = threads.submit(check, pool, ["math"], expected)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            check(pool, ["law"], expected)
        waiting.result(timeout=60)
    assert pool.statistics().resident == ("math",)


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@torch.no_grad()
def test_an_active_adapter_stays(folder, expected, is_merged):
    pool = make_pool(folder, 6 * ROW)  # "law" has 4 experts, the others 2, 5, 2 and 4
    model = pool.model
    model.set_adapter(pool.get("law"))
    if is_merged:
        model.merge_adapter()
    pool.get("code")
    pool.get("mail")  # in place of "code", although "law" was not used for longer
    assert pool.statistics().resident == ("law", "mail")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected["law"])
    with pytest.raises(ValueError, match=r"no room for \['math'\] beside \['law'\]"):
        pool.get("math")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected["law"])
    model.set_adapter("first")
    pool.get("math")
    assert pool.statistics().resident == ("math",)
    pool.close()


def test_compact_files_are_loaded_from(folder, expected, tmp_path):
    base = tmp_path / "base"
    tiny_model("olmoe").save_pretrained(base)
    compact(folder / "law", tmp_path / "rows", base=base)
    pool = AdapterPool(first_model(folder), 20 * ROW)
    pool.add("rows", tmp_path / "rows")
    pool.add("deltas", folder / "law")
    pool.add("code", folder / "code")
    for _ in range(2):
        with pool.using("rows", "deltas", "code") as names:
            own = answers(pool.model, names)
        torch.testing.assert_close(own[1], expected["law"][1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own[0], expected["law"][0], rtol=1e-4, atol=1e-5)
        pool.drop("code")
        pool.drop("rows")


def test_what_cannot_be_loaded_changes_nothing(folder, expected, tmp_path):
    torch.manual_seed(3)
    get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    for kind in ("missing", "unfit"):
        (tmp_path / kind).mkdir()
        weights = load_file(folder / "law" / "adapter_model.safetensors")
        config = json.loads((folder / "law" / "adapter_config.json").read_text())
        if kind == "missing":
            weights.pop(next(iter(weights)))
        else:
            config["target_experts"] = {"model.layers.0.mlp.experts": [99]}
        save_file(weights, tmp_path / kind / "adapter_model.safetensors")
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps(config))
    pool = make_pool(folder, 6 * ROW)
    pool.add("missing", tmp_path / "missing")
    pool.get("law")
    before = {name: id(parameter) for name, parameter in pool.model.named_parameters()}
    with pytest.raises(ValueError, match="is missing"):
        pool.get("missing")
    assert "missing" not in pool.model.peft_config
    (tmp_path / "no weights").mkdir()
    (tmp_path / "no weights" / "adapter_config.json").write_bytes((folder / "law/adapter_config.json").read_bytes())
    refusals = {
        "lora": "holds an adapter of type .*LORA, not ESFT",
        "unfit": r"it has no expert \[99\]",
        "nowhere": r"Can't find 'adapter_config.json'",
        "no weights": r"has the config of an adapter, but no adapter_model\.safetensors",
    }
    for name, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            pool.add(name, tmp_path / name)
        assert name not in pool
    with pytest.raises(ValueError, match="there already is an adapter 'first'"):
        pool.add("first", folder / "law")
    with pytest.raises(ValueError, match=r"has no adapters \['x'\]"):
        pool.get("x")
    with pytest.raises(ValueError, match="but device_bytes is"), pool.using("law", "math"):
        pass
    assert {name: id(parameter) for name, parameter in pool.model.named_parameters()} == before
    check(pool, ["law", "__base__"], expected)


def test_an_adapter_of_the_same_name_that_was_loaded_beside_it_stays(folder, expected):
    pool = make_pool(folder, 6 * ROW)
    pool.add("q", folder / "math")
    pool.model.load_adapter(str(folder / "law"), adapter_name="q")
    before = {name: id(parameter) for name, parameter in pool.model.named_parameters()}
    with pytest.raises(ValueError, match="the model has an adapter 'q' that is not the pool's"):
        pool.get("q")
    assert {name: id(parameter) for name, parameter in pool.model.named_parameters()} == before
    assert "q" in pool.model.peft_config


@pytest.mark.parametrize("is_dropped", [False, True])
def test_an_adapter_that_was_deleted_from_the_model_is_loaded_again(folder, expected, is_dropped):
    pool = make_pool(folder, 6 * ROW)
    check(pool, ["math", "__base__", "math"], expected)
    pool.model.delete_adapter("math")
    if is_dropped:
        pool.drop("math")
        assert pool.statistics().resident == ()
    check(pool, ["math", "__base__", "math"], expected)
    check(pool, ["law", "law", "__base__"], expected)  # in its place


def test_an_evicted_adapter_comes_back_from_host_memory_without_its_file(folder, expected, tmp_path):
    pool = make_pool(folder, 9 * ROW)
    shutil.copytree(folder / "law", tmp_path / "law")
    pool.add("q", tmp_path / "law")
    pool.get("q")
    shutil.rmtree(tmp_path / "law")
    with pool.using("law", "math"):
        assert "q" not in pool.model.peft_config
    pool.get("q")
    assert "q" in pool.statistics().resident and pool.statistics().reads == 3


def test_another_base_is_noticed_when_an_adapter_is_added(folder, tmp_path):
    shutil.copytree(folder / "law", tmp_path / "law")
    config = json.loads((tmp_path / "law" / "adapter_config.json").read_text())
    rows = config["base_fingerprint"]["rows"]
    config["base_fingerprint"]["rows"] = dict.fromkeys(rows, "bf16:0123456789abcdef")
    config["base_model_name_or_path"] = "someone/base"
    (tmp_path / "law" / "adapter_config.json").write_text(json.dumps(config))
    pool = make_pool(folder, 6 * ROW)
    pool.model.base_model.model.name_or_path = "someone/other"
    with pytest.raises(ValueError, match="Its base was 'someone/base', this one is 'someone/other'"):
        pool.add("other", tmp_path / "law")
    config["target_experts"] = {"model.layers.7.mlp.experts": [1]}
    (tmp_path / "law" / "adapter_model.safetensors").unlink()
    (tmp_path / "law" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not the path of an experts module of this model"):
        pool.add("other", tmp_path / "law")


def test_sizes_are_numbers_or_texts_with_a_unit(folder):
    pool = AdapterPool(first_model(folder), "1.5MiB", host_bytes="2gb")
    assert (pool.device_bytes, pool.host_bytes) == (3 * 2**19, 2 * 10**9)
    for size in ("1", "many", "-1GB", 0, 1.5, True):
        with pytest.raises(ValueError, match=r'_bytes is .*; expected a number of bytes, or a text such as "8GB"'):
            AdapterPool(pool.model, size)
        with pytest.raises(ValueError, match="host_bytes is"):
            AdapterPool(pool.model, 10, host_bytes=size)


def test_only_models_with_an_esft_adapter_have_pools():
    with pytest.raises(ValueError, match="without an ESFT adapter"):
        AdapterPool(tiny_model("olmoe"), 10)


@pytest.mark.slow
def test_answers_are_right_under_long_load(folder, expected):
    pool = make_pool(folder, 10 * ROW, host_bytes=80_000)
    serve_under_load(pool, expected, num_requests=1_000, seed=2)
    pool.close()
