"""An adapter that was trained over one class of a checkpoint is used over another one."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from peft_esft import AdapterPool, ESFTConfig, ESFTLayer, find_experts, hotswap_adapter, score_experts
from peft_esft.interchange import compact, export_official, merge_checkpoint
from peft_esft.tuner.other_classes import find_prefixes, matching_paths, moved

import zoo
from checkpoints import randomize, tensors_of


TOKENS = torch.arange(3, 15)[None]


# All classes of all architectures.


def classes_of(model):
    """The model, and the model in all other classes of its file that hold experts of it: the same tensors."""
    module = importlib.import_module(type(model).__module__)
    others = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    parts = {type(part): part for part in model.modules() if isinstance(part, PreTrainedModel)}
    found = {type(model).__name__: model}
    for other in others:
        if not issubclass(other, PreTrainedModel) or other.__name__.endswith("PreTrainedModel"):
            continue
        built = copy.deepcopy(parts[other]) if other in parts else around(other, model, parts)
        if built is not None and experts_by_weights(built).keys() & experts_by_weights(model).keys():
            found[other.__name__] = built.eval()
    return found


def around(model_class, model, parts):
    """A class around parts of a model, as a class with another head is; None if it does not go with its config."""
    configs = [part.config for part in parts.values() if type(part.config) is model_class.config_class]
    if not configs:
        return None
    built = model_class._from_config(configs[0])
    for name, child in built.named_children():
        part = getattr(model, name, None)
        part = part if type(part) is type(child) else parts.get(type(child))
        if part is not None:
            child.load_state_dict(part.state_dict(), strict=False)
    return built


def experts_by_weights(model):
    """The paths of a model's experts, by the bytes of their first weights."""
    return {
        container.parameters()[0].detach().flatten()[:64].numpy().tobytes(): path
        for path, container in find_experts(model).items()
    }


def deltas_by_weights(model):
    layers = {layer.path: layer for layer in model.modules() if isinstance(layer, ESFTLayer)}
    paths = {path: weights for weights, path in experts_by_weights(model).items()}
    return {
        paths[path]: {name: delta.detach().clone() for name, delta in layer.tensors_of("default").items()}
        for path, layer in layers.items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[weights][name]) for weights, own in first.items() for name, value in own.items()
    )


def trained_over(model, paths, folder):
    """Saves an adapter with random deltas of some experts; returns its deltas."""
    adapted = get_peft_model(copy.deepcopy(model), ESFTConfig(target_experts={path: [1, 0] for path in paths}))
    randomize(adapted)
    adapted.save_pretrained(folder)
    return deltas_by_weights(adapted)


UNCLEAR = {"NllbMoeEncoder", "NllbMoeDecoder"}
"""Encoders and decoders alone: their paths do not say which of the two they are in the whole model."""

MIXED = {"ernie4_5_vl_moe"}
"""A checkpoint that holds experts in the same tensors as others, see `merge_checkpoint`."""

FAST = ["qwen3_5_moe", "llama4", "switch_transformers", "nllb_moe", "vitpose_backbone"]


def with_slow(model_types):
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in model_types]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", with_slow([*zoo.model_types(), *zoo.VARIANTS]))
def test_trained_over_one_class_loaded_over_all_others_and_merged_into_the_folder(model_type, tmp_path):
    main = zoo.build(model_type)
    main.save_pretrained(tmp_path / "base")
    models = classes_of(main)
    assert len(models) > 1 or model_type == "nemotron_h_omni"
    folders = (tmp_path / str(number) for number in itertools.count())
    for (name, model), (other_name, other) in itertools.permutations(models.items(), 2):
        shared = experts_by_weights(other).keys()
        trainable = {path for path, container in find_experts(model).items() if container.refusal is None}
        paths = [path for w, path in experts_by_weights(model).items() if w in shared and path in trainable]
        if not paths:
            continue
        folder = next(folders)
        deltas = trained_over(model, paths, folder)
        own = copy.deepcopy(other)
        if name in UNCLEAR and len(experts_by_weights(other)) > len(experts_by_weights(model)):
            with pytest.raises(ValueError, match=r"may mean each of \['(model\.)?encoder\..*', '(model\.)?decoder\."):
                PeftModel.from_pretrained(own, folder)
            continue
        adapted = PeftModel.from_pretrained(own, folder)
        assert same(deltas_by_weights(adapted), deltas), (name, other_name)
        if other is main and model_type not in MIXED:
            adapted.merge_and_unload().save_pretrained(folder / "expected")
            merge_checkpoint(tmp_path / "base", folder, folder / "merged")
            expected, merged = tensors_of(folder / "expected"), tensors_of(folder / "merged")
            assert expected.keys() == merged.keys()
            assert all(torch.equal(merged[key], expected[key]) for key in merged)


# All ways in, on one architecture: the text class, the whole model, and its part without a head.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and adapters of its text class: experts alone, with shared experts, with the embeddings."""
    root = tmp_path_factory.mktemp("classes")
    zoo.build("qwen3_5_moe").save_pretrained(root / "base")
    text = text_class(root)
    assert list(find_experts(text)) == [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    settings = {
        "experts": {},
        "other": {"target_experts": {"model.layers.1.mlp.experts": [5]}},
        "shared": {"train_shared_experts": True},
        "embeddings": {"modules_to_save": ["model.embed_tokens"]},
    }
    for name, own in settings.items():
        experts = {f"model.layers.{layer}.mlp.experts": [3, 0] for layer in (0, 2)}
        adapted = get_peft_model(text_class(root), ESFTConfig(**{"target_experts": experts} | own))
        adapted.base_model.model.name_or_path = str(root / "base")
        randomize(adapted)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "modules_to_save.default" in key:
                    parameter.normal_()
        adapted.save_pretrained(root / name)
    return root


def text_class(root):
    return AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)


def whole(root):
    return AutoModelForImageTextToText.from_pretrained(root / "base", dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def expected(root, name):
    return logits(PeftModel.from_pretrained(text_class(root), root / name))


@pytest.mark.parametrize("name", ["experts", "shared"])
def test_it_computes_the_same_over_the_whole_model(name, folder, tmp_path):
    adapted = PeftModel.from_pretrained(whole(folder), folder / name)
    assert torch.equal(logits(adapted), expected(folder, name))
    config = adapted.peft_config["default"]
    paths = [f"model.language_model.layers.{layer}.mlp.experts" for layer in (0, 2)]
    assert list(config.target_experts) == paths
    assert list(config.base_fingerprint["rows"]) == list(config.base_fingerprint["num_experts"]) == paths
    adapted.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(whole(folder), tmp_path / "again")), logits(adapted))
    back = PeftModel.from_pretrained(text_class(folder), tmp_path / "again")
    assert torch.equal(logits(back), logits(adapted))


def test_it_is_used_without_a_head(folder):
    headless = AutoModel.from_pretrained(folder / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(headless, folder / "experts").eval()
    with torch.no_grad():
        hidden = adapted(input_ids=TOKENS).last_hidden_state
    assert torch.equal(whole(folder).lm_head(hidden), expected(folder, "experts"))


def test_all_other_ways_in(folder):
    adapted = PeftModel.from_pretrained(whole(folder), folder / "experts")
    adapted.load_adapter(folder / "other", adapter_name="other")
    adapted.load_adapter(folder / "experts", adapter_name="default")  # over its own weights
    assert torch.equal(logits(adapted), expected(folder, "experts"))
    with pytest.raises(ValueError, match=r"is missing.*hotswap_adapter"):
        adapted.load_adapter(folder / "other", adapter_name="default")
    hotswap_adapter(adapted, folder / "other", adapter_name="default")
    assert torch.equal(logits(adapted), expected(folder, "other"))
    pool = AdapterPool(adapted, device_bytes=10**9)
    pool.add("pooled", folder / "shared")
    with pool.using("pooled"):
        adapted.set_adapter("pooled")
        assert torch.equal(logits(adapted), expected(folder, "shared"))
    pool.close()


def test_scores_of_one_class_choose_the_experts_of_another(folder):
    scores = score_experts(text_class(folder), [{"input_ids": TOKENS}], progress=False)
    config = ESFTConfig.from_scores(scores, top_p=0.3)
    adapted = get_peft_model(whole(folder), config)
    own = ESFTConfig.from_scores(score_experts(whole(folder), [{"input_ids": TOKENS}], progress=False), top_p=0.3)
    assert adapted.peft_config["default"].target_experts == own.target_experts
    assert adapted.peft_config["default"].selection == own.selection


@pytest.mark.parametrize("name", ["experts", "shared", "embeddings"])
def test_it_is_merged_into_the_folder_of_its_base(name, folder, tmp_path):
    merge_checkpoint(folder / "base", folder / name, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(merged), expected(folder, name))


def test_smaller_files_and_the_original_code_s(folder, tmp_path):
    for form in ("rows", "int8"):
        compact(folder / "experts", tmp_path / form, form=form, base=folder / "base")
    small = PeftModel.from_pretrained(text_class(folder), tmp_path / "rows")
    assert torch.equal(logits(small), expected(folder, "experts"))
    PeftModel.from_pretrained(whole(folder), tmp_path / "int8")
    export_official(folder / "experts", folder / "base", tmp_path / "official")
    assert "model.language_model.layers.2.mlp.experts.3.up_proj.weight" in tensors_of(tmp_path / "official")


def test_modules_to_save_are_moved_by_the_users_of_peft(folder):
    model = whole(folder)
    with pytest.raises(
        NotImplementedError, match=r"has another name for .*embed_tokens.weight.*argument key_mapping="
    ) as error:
        PeftModel.from_pretrained(model, folder / "embeddings")
    assert not any(isinstance(module, ESFTLayer) for module in model.modules())
    mapping = eval(str(error.value).partition("key_mapping=")[2])
    adapted = PeftModel.from_pretrained(model, folder / "embeddings", key_mapping=mapping)
    assert torch.equal(logits(adapted), expected(folder, "embeddings"))
    adapted.load_adapter(folder / "embeddings", adapter_name="second", key_mapping=mapping)
    adapted.set_adapter("second")
    assert torch.equal(logits(adapted), expected(folder, "embeddings"))


def test_transformers_loader_is_refused(folder):
    model = whole(folder)
    with pytest.raises(NotImplementedError, match=r"another class of the base's checkpoint.*with PEFT's"):
        model.load_adapter(str(folder / "experts"))
    text = text_class(folder)
    text.load_adapter(str(folder / "experts"))
    assert torch.equal(logits(text), expected(folder, "experts"))


def test_a_file_without_a_note_of_its_experts(folder, tmp_path):
    """As files of the first versions are."""
    (tmp_path / "adapter_config.json").write_bytes((folder / "experts" / "adapter_config.json").read_bytes())
    save_file(load_file(folder / "experts" / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(whole(folder), tmp_path)), expected(folder, "experts"))


def test_paths():
    own = ["thinker.model.layers.0.experts", "talker.layers.0.experts", "visual.blocks.0.experts"]
    assert matching_paths("model.layers.0.experts", own) == own[:1]
    assert matching_paths("layers.0.experts", own) == own[:2]
    assert matching_paths("layers.1.experts", own) == matching_paths("blocks.experts", own) == []
    assert matching_paths("experts", ["model.experts"]) == []
    prefixes = find_prefixes(["model.layers.0.experts", "visual.blocks.0.experts"], own)
    assert prefixes == {"": "thinker."}
    assert moved("lm_head", prefixes) == "thinker.lm_head"
    assert moved("3", prefixes) == "3"
    assert moved("model.norm", {"model.": "", "": "x."}) == "norm"
