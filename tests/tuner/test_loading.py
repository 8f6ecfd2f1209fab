"""What a file may change is decided by its config, on every way in; what is refused changes nothing."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_esft import AdapterPool, hotswap_adapter
from peft_esft.interchange import compact, export_official, merge_checkpoint

from families import tiny_model
from oracle import config_for, random_tokens
from refusals import REFUSALS, WEIGHTS, rewrite_config


TOKENS = random_tokens()
OTHERS = [2, 0, 7]
PREFIX = "base_model.model."


def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and an adapter of it that holds a module beside its experts; an adapter of experts alone."""
    root = tmp_path_factory.mktemp("loading")
    tiny_model("olmoe").save_pretrained(root / "base")
    for name, settings in (("experts", {}), ("head", {"modules_to_save": ["lm_head"]})):
        model = get_peft_model(base_of(root), config_for(tiny_model("olmoe"), init_weights=False, **settings))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key:
                    parameter.add_(0.1)
        model.save_pretrained(root / name)
    return root


def base_of(root):
    return AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)


# How files are changed. Each takes the tensors and the config's fields, and a source of chance.


def foreign(tensors, fields, chance):
    names = [key for key in tiny_model("olmoe").state_dict() if "experts" not in key and "lm_head" not in key]
    name = chance.choice(names)
    tensors[PREFIX + name] = torch.zeros_like(tiny_model("olmoe").state_dict()[name])


def unknown(tensors, fields, chance):
    tensors[f"{PREFIX}{chance.choice(['x', 'model.layers.0.lora_A', 'model.layers.9.mlp.experts.esft_w'])}.weight"] = (
        torch.ones(2)
    )


def missing(tensors, fields, chance):
    del tensors[chance.choice(sorted(tensors))]


def renamed(tensors, fields, chance):
    key = chance.choice(sorted(tensors))
    tensors[
        key.replace(*chance.choice([("layers.", "layers.1"), ("proj", "norm"), ("esft_", ""), (PREFIX, "y.")]))
    ] = tensors.pop(key)
    if key in tensors:  # the replacement changed nothing
        del tensors[key]


def swapped(tensors, fields, chance):
    first, second = (next(key for key in sorted(tensors) if name in key) for name in ("gate_up_proj", "down_proj"))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def of_other_experts(tensors, fields, chance):
    path = chance.choice(sorted(fields["target_experts"]))
    ids = fields["target_experts"][path]
    fields["target_experts"][path] = chance.choice([ids[::-1], [ids[0], ids[1], 3], [*ids, 3], ids[:2]])


def misshapen(tensors, fields, chance):
    key = chance.choice(sorted(tensors))
    tensors[key] = chance.choice([tensors[key][:-1], tensors[key][..., :-1], tensors[key][None]]).clone()


def of_other_kind(tensors, fields, chance):
    key = chance.choice(sorted(tensors))
    tensors[key] = tensors[key].to(chance.choice([torch.int8, torch.uint8, torch.int64, torch.bool]))


def not_finite(tensors, fields, chance):
    key = chance.choice(sorted(tensors))
    tensors[key].view(-1)[chance.randrange(tensors[key].numel())] = chance.choice([float("nan"), float("inf")])


def without_module(tensors, fields, chance):
    fields["modules_to_save"] = None
    tensors[f"{PREFIX}lm_head.weight"] = torch.zeros(128, 32)


CHANGES = (
    foreign, unknown, missing, renamed, swapped, of_other_experts, misshapen, of_other_kind, not_finite, without_module
)  # fmt: skip


def change_file(source, folder, change, chance):
    """A copy of an adapter in which one thing is wrong. The header's note is kept, as PEFT's users would."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if change == "truncate":
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: chance.randrange(len(content))])
        return
    tensors, fields = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / WEIGHTS, "pt") as file:
        note = file.metadata()
    change(tensors, fields, chance)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, note)
    rewrite_config(folder, **fields)


# The ways in. Each is given a model that has an adapter already, and the folder.


def from_pretrained(root, model, folder):
    base = base_of(root)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    try:
        PeftModel.from_pretrained(base, folder)
    finally:
        after = base.state_dict()
        assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
        assert not hasattr(base, "peft_config")


def load_new(root, model, folder):
    model.load_adapter(folder, "new")


def load_existing(root, model, folder):
    model.load_adapter(folder, "resident")


def transformers_load(root, model, folder):
    base = base_of(root)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    try:
        base.load_adapter(str(folder))
    finally:
        after = base.state_dict()
        assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


def swap(root, model, folder):
    hotswap_adapter(model, folder, "resident")


def pool(root, model, folder):
    adapters = AdapterPool(model, device_bytes=2**24)
    try:
        adapters.add("pooled", folder)
        adapters.get("pooled")
    finally:
        adapters.close()


def merge(root, model, folder):
    merge_checkpoint(root / "base", folder, folder / "out")


def make_small(root, model, folder):
    compact(folder, folder / "out", form="rows", base=root / "base")


def export(root, model, folder):
    export_official(folder, root / "base", folder / "out")


WAYS = (from_pretrained, load_new, load_existing, transformers_load, swap, pool, merge, make_small, export)


def resident(root, kind):
    settings = {"modules_to_save": ["lm_head"]} if kind == "head" else {}
    config = config_for(tiny_model("olmoe"), init_weights=False, **settings)
    return get_peft_model(base_of(root), config, adapter_name="resident")


def check_refused(folders, tmp_path, way, change, kind, chance):
    model = resident(folders, kind)
    before, expected = {key: value.clone() for key, value in model.state_dict().items()}, outputs(model)
    folder = tmp_path / "changed"
    change_file(folders / kind, folder, change, chance)
    # The last two are PEFT's own, where it reads a file that is cut short, or lacks a module of `modules_to_save`.
    with pytest.raises((*REFUSALS, *((SafetensorError, KeyError) if way is load_existing else ()))):
        way(folders, model, folder)
    assert not (folder / "out").exists()
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert list(model.peft_config) == ["resident"] and torch.equal(outputs(model), expected)
    shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore:the adapter was trained over a base with other weights")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("change", [*CHANGES, "truncate"], ids=lambda change: getattr(change, "__name__", change))
def test_a_file_that_is_not_its_config_s_is_refused_on_every_way_in(change, way, folders, tmp_path):
    kind = "head" if change is without_module and way is not swap else "experts"
    check_refused(folders, tmp_path, way, change, kind, random.Random(0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the adapter was trained over a base with other weights")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_many_changed_files_are_refused_on_every_way_in(way, folders, tmp_path):
    chance = random.Random(way.__name__)
    for _ in range(120):
        change = chance.choice([*CHANGES, "truncate"])
        kind = "experts" if way is swap or way is export else chance.choice(["experts", "head"])
        check_refused(folders, tmp_path, way, change, kind, chance)


@pytest.mark.parametrize("kind", ["experts", "head"])
def test_the_same_adapter_is_loaded_again_under_its_name(kind, folders):
    model = resident(folders, kind)
    model.load_adapter(folders / kind, "resident")
    assert torch.equal(outputs(model), outputs(PeftModel.from_pretrained(base_of(folders), folders / kind)))


def test_other_scaling_is_refused_under_an_existing_name(folders, tmp_path):
    settings = {"rank": 2, "init_weights": False}
    get_peft_model(base_of(folders), config_for(tiny_model("olmoe"), alpha=8.0, **settings)).save_pretrained(tmp_path)
    model = get_peft_model(base_of(folders), config_for(tiny_model("olmoe"), **settings))
    with pytest.raises(ValueError, match=r"scaled by 4.0, but those of 'default' by 1.0.*hotswap_adapter"):
        model.load_adapter(tmp_path, "default")


def test_a_file_names_its_experts_and_the_same_tensors_give_the_same_bytes(folders, tmp_path):
    with safe_open(folders / "experts" / WEIGHTS, "pt") as file:
        noted = json.loads(file.metadata()["esft_experts"])
    assert noted == json.loads((folders / "experts" / "adapter_config.json").read_text())["target_experts"]
    model = PeftModel.from_pretrained(base_of(folders), folders / "experts")
    contents = set()
    for number in range(4):
        model.save_pretrained(tmp_path / str(number))
        contents.add((tmp_path / str(number) / WEIGHTS).read_bytes())
    assert contents == {(folders / "experts" / WEIGHTS).read_bytes()}


def test_a_malformed_note_is_refused(folders, tmp_path):
    shutil.copytree(folders / "experts", tmp_path, dirs_exist_ok=True)
    for note in ("{", "[]", '{"a": "b"}', '{"a": [1.5]}'):
        save_file(load_file(folders / "experts" / WEIGHTS), tmp_path / WEIGHTS, {"esft_experts": note})
        with pytest.raises(ValueError, match=r"the note esft_experts in the header of .* is malformed"):
            PeftModel.from_pretrained(base_of(folders), tmp_path)


@pytest.mark.filterwarnings("ignore:.*resized during finetuning", "ignore:Found missing adapter keys")
def test_resized_embeddings_belong_to_their_adapter_alone(tmp_path):
    base = tiny_model("olmoe")
    size = base.config.vocab_size + 8
    base.resize_token_embeddings(size, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    tokens = torch.randint(3, size, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=tokens)[0]

    expected = {None: logits(base_of(tmp_path))}
    for number, name in enumerate(("a", "b")):
        model = get_peft_model(base_of(tmp_path), config_for(base, [number, 3], init_weights=False))
        with torch.no_grad():
            model.get_base_model().model.embed_tokens.weight[-8:] += number + 1
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
    plain = base_of(tmp_path)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    for name in ("b", "a"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name])
    with model.disable_adapter():
        assert torch.equal(logits(model), expected[None])
    after = model.unload().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[5, 9], {"embed_tokens": [5, 9]}], ids=["list", "dict"])
def test_tokens_are_trained_beside_experts_as_with_lora(indices, tied, tmp_path):
    def new_base():
        base = tiny_model("olmoe")
        base.config.tie_word_embeddings = tied
        if tied:
            base.tie_weights()
        return base

    base = outputs(new_base())
    model = get_peft_model(new_base(), config_for(tiny_model("olmoe"), trainable_token_indices=indices))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    TOKENS[0, 0] = 5
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(new_base(), tmp_path)
    assert torch.equal(outputs(loaded), expected)
    with torch.no_grad():
        mixed = loaded(input_ids=TOKENS, adapter_names=["default", "__base__"])[0]
    torch.testing.assert_close(mixed[0], expected[0])
    torch.testing.assert_close(mixed[1], outputs(new_base())[1])
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded), outputs(new_base()))
    assert torch.equal(outputs(loaded.unload()), outputs(new_base()))
    merged = PeftModel.from_pretrained(new_base(), tmp_path).merge_and_unload()
    torch.testing.assert_close(outputs(merged), expected)
    assert not torch.equal(base, expected)


@pytest.mark.filterwarnings("ignore:.*resized during finetuning")
def test_the_file_of_a_resized_embedding_with_trained_tokens_has_no_copy_of_the_base(tmp_path):
    base = tiny_model("olmoe")
    config = config_for(base, trainable_token_indices=[5])
    get_peft_model(base, config).save_pretrained(tmp_path, save_embedding_layers=True)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        others = {key for key in file.keys() if "esft_" not in key}  # noqa: SIM118
    assert others == {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", f"{PREFIX}lm_head.weight"}
    PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
