"""The model card, the Hub, and adapters put on another base."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

from peft_esft import ESFTConfig, score_experts
from peft_esft.interchange import compact, merge_checkpoint
from peft_esft.tuner.adapter_file import is_hub_name

from families import tiny_model
from hub import Hub
from oracle import config_for, random_tokens


SELECTION = {"metric": "token", "top_p": 0.2, "averaging": "sample", "num_tokens": 1234, "num_samples": 5}


def wrapped(name="someone/base", family="olmoe", **settings):
    base = tiny_model(family)
    base.name_or_path = name
    base.config._name_or_path = name
    settings = {"task_type": "CAUSAL_LM", "selection": SELECTION, "init_weights": False, **settings}
    return get_peft_model(base, config_for(base, **settings))


def test_the_card_says_what_the_adapter_is(tmp_path):
    model = wrapped(revision="abc123")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["library_name"] == "peft"
    assert card.data["base_model"] == "someone/base"
    assert {"esft", "peft", "mixture-of-experts", "base_model:adapter:someone/base"} <= set(card.data["tags"])
    assert card.data["pipeline_tag"] == "text-generation"
    assert "More Information Needed" not in card.text
    for text in (
        "`someone/base`",
        "`abc123`",
        "metric token, top_p 0.2",
        "num_tokens 1234",
        "CAUSAL_LM",
        "| `model.layers.1.mlp.experts` | 3 of 8 | 1, 5, 6 |",
        "6 in 2 layers",
        f"{(tmp_path / 'adapter_model.safetensors').stat().st_size / 1e6:.2f} MB, 4 tensors",
        "fp32 deltas",
    ):
        assert text in card.text, text


def test_the_card_names_what_is_trained_besides(tmp_path):
    wrapped().save_pretrained(tmp_path / "experts")
    wrapped(family="deepseek_v2", train_shared_experts=True, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    text = (tmp_path / "experts" / "README.md").read_text()
    assert "only the experts below were trained" in text and "trained besides" not in text
    text = (tmp_path / "README.md").read_text()
    assert "only the experts below and the modules named below were trained" in text
    assert "| trained besides | shared experts, lm_head |" in text


def test_the_card_leaves_out_what_options_leave_out(tmp_path):
    wrapped(layers_to_transform=[1]).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| 3 in 1 layers |" in text
    assert "`model.layers.1.mlp.experts`" in text and "`model.layers.0.mlp.experts`" not in text


def test_the_card_names_the_commit_and_the_task(tmp_path):
    base = tiny_model("olmoe")
    base.config._commit_hash = "c0ffee"
    scores = recorded_scores(base)
    model = get_peft_model(base, ESFTConfig.from_scores(scores, task="legal questions"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| revision | `c0ffee` |" in text and "| task | legal questions |" in text
    assert "| experts chosen by | metric token, top_p 0.2, averaging sample, num_tokens 24, num_samples 2 |" in text
    PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path))


def recorded_scores(model):
    return score_experts(model, [{"input_ids": random_tokens()}], progress=False)


def test_the_three_lines_of_the_card_load_the_adapter(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_for(base, task_type="CAUSAL_LM", init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert code.startswith("import peft_esft") and len(code.splitlines()) == 3
    namespace: dict = {}
    exec(code.replace("name or folder of this adapter", str(tmp_path / "adapter")), namespace)
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(namespace["model"](input_ids=tokens)[0], model(input_ids=tokens)[0])
    # What PEFT writes as the base is left alone, a path of this machine too.
    assert card.data["base_model"] == str(tmp_path / "base")


def test_what_people_wrote_stays(tmp_path):
    model = wrapped()
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [law]\n---\n# My adapter\n\nMade with care.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data["license"] == "mit"
        assert "Made with care." in card.text and card.text.count("## Trained experts") == 1


def test_named_and_compact_adapters_have_cards_too(tmp_path):
    base = tiny_model("olmoe", torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_for(base, init_weights=False), adapter_name="law")
    model.save_pretrained(tmp_path)
    assert "3 of 8" in (tmp_path / "law" / "README.md").read_text()
    compact(tmp_path / "law", tmp_path / "small", form="rows", base=tmp_path / "base")
    assert "effective weights, for inference" in (tmp_path / "small" / "README.md").read_text()
    ESFTConfig(target_experts={0: [1]}).save_pretrained(str(tmp_path / "selection"))
    assert [path.name for path in (tmp_path / "selection").iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("gpt2", True), ("/a/b", False), ("./a", False), ("a/b/c", False), ("", False), (None, False)],
)
def test_hub_names(name, is_one):
    assert is_hub_name(name) is is_one


PUSH = """
import sys
sys.path[:0] = ["tests/support", "tests/tuner", "tests/engines"]
import pytest
import torch
from peft import PeftModel
from peft_esft import push_to_hub
from test_sharing import wrapped
from families import tiny_model
model = wrapped()
commit = push_to_hub(model, "someone/law", token="hf_x", private=True)
assert commit.oid
again = PeftModel.from_pretrained(tiny_model("olmoe"), "someone/law", token="hf_x")
tokens = torch.arange(3, 9)[None]
with torch.no_grad():
    assert torch.equal(again(input_ids=tokens)[0], model(input_ids=tokens)[0])
config = again.peft_config["default"]
assert config.selection["top_p"] == 0.2 and config.base_model_name_or_path == "someone/base"
"""
PUSH_AGAIN = """
import sys
sys.path[:0] = ["tests/support", "tests/tuner", "tests/engines"]
import pytest
import peft_esft
from peft import PeftModel
from peft_esft import push_to_hub
from test_sharing import wrapped
from families import tiny_model
push_to_hub(wrapped(), "someone/law", token="hf_x")
# Loaded under a name, which PEFT would save in a subfolder, over a base from a folder.
model = PeftModel.from_pretrained(tiny_model("olmoe"), "someone/law", adapter_name="mine")
model.load_adapter("someone/law", adapter_name="other")
model.base_model.model.name_or_path = model.base_model.model.config._name_or_path = "/home/me/base"
with pytest.raises(ValueError, match="say which one to upload"):
    push_to_hub(model, "someone/mine")
with pytest.raises(ValueError, match="there is no adapter 'default'"):
    push_to_hub(model, "someone/mine", "default")
push_to_hub(model, "someone/mine", "mine", token="hf_x")
model.peft_config["other"].base_model_name_or_path = None
with pytest.raises(ValueError, match="'/home/me/base', which is not the name of a model on the Hub"):
    push_to_hub(model, "someone/other", "other", token="hf_x")
"""
STRANGERS = """
import os, sys
sys.path[:0] = ["tests/support", "tests/tuner", "tests/engines"]
import pytest, torch
import peft_esft
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file, save_file
from peft_esft import ESFTConfig, ESFTLayer
from test_sharing import wrapped
from families import tiny_model
api = HfApi(token="hf_x")
file = f"{FOLDER}/adapter_model.safetensors"
def publish(name):
    api.create_repo(name)
    for place in (None, "sub"):
        api.upload_folder(repo_id=name, folder_path=FOLDER, path_in_repo=place)
wrapped().save_pretrained(FOLDER)
publish("someone/good")
good = load_file(file)
save_file({key: value[..., :-1].contiguous() for key, value in good.items()}, file)
publish("someone/narrow")
torch.save(good, f"{FOLDER}/adapter_model.bin")
os.remove(file)
publish("someone/pickled")
base = tiny_model("olmoe")
for where in ({"token": "hf_x"}, {"token": "hf_x", "subfolder": "sub"}):
    for name, message in (("narrow", "do not fit the model"), ("pickled", "use_safetensors=False")):
        config = ESFTConfig.from_pretrained(f"someone/{name}", **where)
        assert config.target_experts
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, f"someone/{name}", **where)
        assert not any(isinstance(module, ESFTLayer) for module in base.modules())
model = PeftModel.from_pretrained(base, "someone/good", **where)
for name, message in (("narrow", "do not fit the model"), ("pickled", "use_safetensors=False")):
    with pytest.raises(ValueError, match=message):
        model.load_adapter(f"someone/{name}", adapter_name="second", **where)
    assert list(model.peft_config) == ["default"]
for place in (None, "sub"):
    PeftModel.from_pretrained(tiny_model("olmoe"), "someone/pickled", subfolder=place, use_safetensors=False)
PeftModel.from_pretrained(tiny_model("olmoe"), "someone/good")
"""
OFFLINE = """
import sys
sys.path[:0] = ["tests/support", "tests/tuner", "tests/engines"]
import pytest
import peft_esft
from peft import PeftModel
from families import tiny_model
PeftModel.from_pretrained(tiny_model("olmoe"), "someone/good")
for name, message in (("narrow", "do not fit the model"), ("pickled", "use_safetensors=False")):
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_model("olmoe"), f"someone/{name}")
"""

POOLED = """
import sys
sys.path[:0] = ["tests/support", "tests/tuner", "tests/engines"]
import peft_esft
from huggingface_hub import HfApi
from peft_esft import AdapterPool
from test_sharing import wrapped
model = wrapped()
model.save_pretrained(FOLDER)
api = HfApi(token="hf_x")
pool = AdapterPool(model, device_bytes=model.base_model.rows_nbytes(model.peft_config["default"]))
for name in ("law", "code"):
    api.create_repo(f"someone/{name}")
    api.upload_folder(repo_id=f"someone/{name}", folder_path=FOLDER)
    pool.add(name, f"someone/{name}")
pool.get("law")
pool.get("code")
api.create_repo("someone/loaded-once")
pool.get("law")
assert pool.statistics().evictions == 2
"""


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_with_hub(hub, code, folder, **settings):
    """Runs code in a process of its own, since huggingface_hub reads its settings once."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder), **settings}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", f"FOLDER = {str(folder / 'law')!r}\n{code}"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_pool_asks_the_hub_once_for_each_adapter(hub, tmp_path):
    run_with_hub(hub, POOLED, tmp_path)
    # The last repository is made when both adapters were loaded; then one of them is loaded again.
    last = max(number for number, (_, path) in enumerate(hub.requests) if path == "/api/repos/create")
    assert "someone/loaded-once" in hub.repositories
    assert hub.requests[last + 1 :] == []


def card_on(hub, name):
    return ModelCard(hub.repositories[name]["README.md"].decode())


def test_pushing_to_the_hub_and_loading_from_it(hub, tmp_path):
    run_with_hub(hub, PUSH, tmp_path)
    files = hub.repositories["someone/law"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = card_on(hub, "someone/law")
    assert card.data["base_model"] == "someone/base" and card.data["library_name"] == "peft"
    assert "import peft_esft" in card.text and "More Information Needed" not in card.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("someone/law")' in card.text
    assert hub.validated and all("library_name: peft" in content for content in hub.validated)
    assert len(hub.uploads) == 1  # the weights; the rest is small


FORM = "---\nlibrary_name: transformers\ntags: []\n---\n# Model card\n\n[More Information Needed]\n"
WRITTEN = "---\nlicense: mit\ntags: [law]\n---\n# Law\n\nMade with care.\n"


@pytest.mark.parametrize("before", [FORM, WRITTEN], ids=["form", "written"])
def test_pushing_keeps_what_people_wrote_and_replaces_a_form(before, hub, tmp_path):
    hub.repositories["someone/law"] = {"README.md": before.encode()}
    run_with_hub(hub, PUSH_AGAIN, tmp_path)
    card = card_on(hub, "someone/law")
    assert card.data["library_name"] == "peft" and "## Trained experts" in card.text
    assert "More Information Needed" not in card.text
    if before == WRITTEN:
        assert card.data["license"] == "mit" and "law" in card.data["tags"] and "Made with care." in card.text
    mine = card_on(hub, "someone/mine")
    assert set(hub.repositories["someone/mine"]) == set(hub.repositories["someone/law"])
    assert mine.data["base_model"] == "someone/base" and "base_model:adapter:someone/base" in mine.data["tags"]
    assert not any("/home" in content for content in hub.validated)
    assert "someone/other" not in hub.repositories


def test_what_lies_on_the_hub_is_checked_before_the_model_changes(hub, tmp_path):
    run_with_hub(hub, STRANGERS, tmp_path)
    reads = [path for _, path in hub.requests if "/someone/pickled/resolve/" in path and path.endswith(".bin")]
    assert reads
    run_with_hub(hub, OFFLINE, tmp_path, HF_HUB_OFFLINE="1")


def changed(model):
    """The same model with other weights in its last layer."""
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.down_proj.mul_(1.01)
    return model


def loading_warnings(base, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, str(folder))
    return [str(w.message) for w in caught if "other weights" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_base_of_the_same_shape_is_noticed(dtype, tmp_path):
    wrapped(name="").save_pretrained(tmp_path)
    assert not loading_warnings(tiny_model("olmoe", dtype), tmp_path)
    noticed = loading_warnings(changed(tiny_model("olmoe")).to(dtype), tmp_path)
    # fp16 rounds differently, so that nothing can be said there.
    assert bool(noticed) == (dtype != torch.float16)
    assert all("in 1 of 2 layers, for example model.layers.1.mlp.experts" in message for message in noticed)


def test_a_base_of_another_name_and_other_weights_is_refused(tmp_path):
    wrapped().save_pretrained(tmp_path)
    other = changed(tiny_model("olmoe"))
    other.name_or_path = "someone/other"
    with pytest.raises(ValueError, match="'someone/base', this one is 'someone/other'"):
        PeftModel.from_pretrained(other, str(tmp_path))
    same = tiny_model("olmoe")
    same.name_or_path = "another/copy"
    assert not loading_warnings(same, tmp_path)
    config = ESFTConfig.from_pretrained(str(tmp_path))
    config.base_fingerprint = None
    config.inference_mode = True
    PeftModel.from_pretrained(other, str(tmp_path), config=config)


def test_a_config_that_is_used_again_is_of_the_base_that_it_is_used_on(tmp_path):
    """As for a second stage of training over the merged first one, with the same config."""
    config = config_for(tiny_model("olmoe"))
    get_peft_model(tiny_model("olmoe"), config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other weights")
        second = get_peft_model(changed(tiny_model("olmoe")), copy.deepcopy(config))
    second.save_pretrained(tmp_path)
    assert not loading_warnings(changed(tiny_model("olmoe")), tmp_path)
    assert loading_warnings(tiny_model("olmoe"), tmp_path)
    # What was read with weights stays bound to the base that these are for, also to be trained further.
    with pytest.warns(UserWarning, match="other weights"):
        PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path), is_trainable=True)


def test_other_expert_shapes_are_refused(tmp_path):
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit the model"):
        PeftModel.from_pretrained(altered(intermediate_size=16), str(tmp_path))


def test_another_number_of_experts_is_refused(tmp_path):
    wrapped(name="", selection=None).save_pretrained(tmp_path / "adapter")
    larger = altered(num_experts=16)
    with pytest.raises(ValueError, match=r"were chosen among 8, but this model has 16"):
        PeftModel.from_pretrained(larger, str(tmp_path / "adapter"))
    larger.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"were chosen among 8, but this model has 16"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def altered(**fields):
    config = tiny_model("olmoe").config
    for name, value in fields.items():
        setattr(config, name, value)
    return OlmoeForCausalLM(config)


def test_a_merged_adapter_does_not_look_like_another_base(tmp_path):
    wrapped(name="").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path), adapter_name="first")
    model.merge_adapter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_adapter(str(tmp_path), adapter_name="second")
    assert not [w for w in caught if "other weights" in str(w.message)]


PUSH_FROM_TRAINER = """
import sys
sys.path[:0] = ["tests/support", "tests/tuner", "tests/engines"]
import torch
from families import tiny_model
from peft import PeftModel
from test_trainers import plain_trainer
trainer = plain_trainer(FOLDER, tiny_model("olmoe"), hub_model_id="someone/trained", hub_token="hf_x")
trainer.train()
trainer.push_to_hub(token="hf_x")
again = PeftModel.from_pretrained(tiny_model("olmoe"), "someone/trained", token="hf_x")
tokens = torch.arange(3, 9)[None]
with torch.no_grad():
    assert torch.equal(again(input_ids=tokens)[0], trainer.model.eval()(input_ids=tokens)[0])
"""


def test_a_trainer_pushes_the_adapter_only(hub, tmp_path):
    run_with_hub(hub, PUSH_FROM_TRAINER, tmp_path)
    files = hub.repositories["someone/trained"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert {name for name in files if name.endswith(".safetensors")} == {"adapter_model.safetensors"}
