"""Whatever is done with other adapters between a forward pass and its backward pass, the gradients are the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_esft import AdapterPool, ESFTConfig, hotswap_adapter

from families import tiny_model
from listed import listed_model
from oracle import random_tokens


TOKENS = random_tokens(3, 6)
FAMILIES = {"olmoe": lambda: tiny_model("olmoe"), "gpt_oss": lambda: tiny_model("gpt_oss"), "listed": listed_model}


def config(*experts: int, **fields) -> ESFTConfig:
    return ESFTConfig(target_experts={1: list(experts)}, init_weights=False, **fields)


def build(family: str) -> PeftModel:
    """Adapters "a" (the one under test), "b" with deltas, "c" with a rank and "d" stored as rows."""
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES[family](), config(1, 5), adapter_name="a")
    model.add_adapter("b", config(5, 2, 6))
    model.add_adapter("c", config(0, rank=2))
    model.add_adapter("d", config(3, 5))
    model.base_model.freeze_adapter("d")
    return model.eval()


class Session:
    """A model of which one call waits for its backward pass, and the requests that come in meanwhile."""

    def __init__(self, family: str, folder, *, is_frozen: bool, is_trained: bool) -> None:
        self.model = build(family)
        self.can_mix = family != "listed"
        self.folder = folder
        self.is_trained = is_trained
        self.count = 0
        self.pool: AdapterPool | None = None
        if is_frozen:
            self.model.base_model.freeze_adapter("a")
        self.model.set_adapter("a", inference_mode=not is_trained)

    def pending(self) -> tuple[Tensor, list[Tensor]]:
        embeddings = self.model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        trained = [p for name, p in self.model.named_parameters() if name.endswith(".a") and p.requires_grad]
        loss = self.model(inputs_embeds=embeddings).logits.pow(2).mean()
        return loss, [embeddings, *trained]

    def add(self) -> None:
        self.count += 1
        self.model.add_adapter(f"new{self.count}", config(1, 4))

    def add_stored(self) -> None:
        self.add()
        self.model.base_model.freeze_adapter(f"new{self.count}")

    def delete(self) -> None:
        names = [name for name in self.model.peft_config if name.startswith("new")]
        if names:
            self.model.delete_adapter(names[0])

    def load(self) -> None:
        self.count += 1
        self.model.load_adapter(str(self.folder / "b"), f"new{self.count}")

    def hotswap(self) -> None:
        hotswap_adapter(self.model, self.folder / "c", "c")

    def switch(self) -> None:
        self.model.set_adapter("d", inference_mode=True)
        with torch.no_grad():
            self.model(input_ids=TOKENS)
        self.model.set_adapter("a", inference_mode=not self.is_trained)

    def scale(self) -> None:
        self.model.base_model.set_scale("b", 0.5)

    def mix(self) -> None:
        if self.can_mix:
            names = [name for name in self.model.peft_config if name != "a"]
            with torch.inference_mode():
                self.model(input_ids=TOKENS, adapter_names=[names[-1], "a", "d"])

    def hold(self) -> None:
        with torch.inference_mode(), self.model.base_model.hold():
            self.model(input_ids=TOKENS)

    def use_pool(self) -> None:
        if not self.can_mix:
            return
        if self.pool is None:
            self.pool = AdapterPool(self.model, 10**7)
        self.count += 1
        self.pool.add(f"pool{self.count}", self.folder / "b")
        with self.pool.using(f"pool{self.count}"), torch.inference_mode():
            self.model(input_ids=TOKENS, adapter_names=[f"pool{self.count}", "a", "d"])


REQUESTS = ["add", "add_stored", "delete", "load", "hotswap", "switch", "scale", "mix", "hold", "use_pool"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Files of "b" and "c" by family."""
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        build(family).save_pretrained(found[family], selected_adapters=["b", "c"])
    return found


def check(family, folders, requests, is_frozen, is_trained):
    session = Session(family, folders[family], is_frozen=is_frozen, is_trained=is_trained and not is_frozen)
    loss, leaves = session.pending()
    expected = torch.autograd.grad(loss, leaves, allow_unused=True)
    loss, leaves = session.pending()
    for request in requests:
        getattr(session, request)()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    if session.pool is not None:
        session.pool.close()
    for own, other in zip(found, expected, strict=True):
        assert own is other is None or torch.equal(own, other)
    assert expected[0].any()


@given(st.sampled_from([*FAMILIES]), st.lists(st.sampled_from(REQUESTS), max_size=5), st.booleans(), st.booleans())
@settings(max_examples=12)
@pytest.mark.filterwarnings("ignore")
def test_a_pending_backward_pass_is_not_disturbed(folders, family, requests, is_frozen, is_trained):
    check(family, folders, requests, is_frozen, is_trained)


@pytest.mark.slow
@given(st.sampled_from([*FAMILIES]), st.lists(st.sampled_from(REQUESTS), max_size=12), st.booleans(), st.booleans())
@settings(max_examples=100)
@pytest.mark.filterwarnings("ignore")
def test_many_pending_backward_passes_are_not_disturbed(folders, family, requests, is_frozen, is_trained):
    check(family, folders, requests, is_frozen, is_trained)
