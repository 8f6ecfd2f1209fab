"""Random sequences of everything that can be done with a model, against a reference of plain dense weights."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from peft_esft import AdapterPool, ESFTConfig, ESFTLayer, find_experts, hotswap_adapter
from peft_esft.moe.containers import find_shared_experts
from peft_esft.tuner.fingerprint import record_base

from families import tiny_model
from listed import listed_model
from oracle import random_tokens, task_loss
from reference import DenseAdapter, dense_copy, read_adapter


TOKENS = random_tokens(3, 6)
NAMES = ["a", "b", "c", "d"]
SELECTIONS = [{0: [5, 1, 6], 1: [2]}, {1: [0, 3, 5]}, {0: [1], 1: [1, 2, 3, 4]}, {0: [7, 1]}, {1: [2]}]
PICKS = st.integers(0, 11)
"""Chooses from a list whose length is only known when the rule runs."""

FAMILIES = {
    "olmoe": lambda: tiny_model("olmoe"),  # fused
    "gpt_oss": lambda: tiny_model("gpt_oss"),  # transposed and biased
    "qwen2_moe": lambda: tiny_model("qwen2_moe"),  # shared experts beside
    "listed": listed_model,
}


class InjectedError(Exception):
    """Raised in the middle of a call."""


class WholeModel(RuleBasedStateMachine):
    """One model, wrapped; after each step its weights, its adapters and its outputs are those of the reference."""

    family = "olmoe"
    is_compilable = False
    operations = 0
    """Of all examples together."""

    def __init__(self) -> None:
        super().__init__()
        type(self).operations -= 1  # the first check comes before the first operation
        torch.manual_seed(0)
        self.root = Path(tempfile.mkdtemp())
        self.folders: list[tuple[Path, DenseAdapter]] = []
        base = FAMILIES[self.family]()
        self.reference = dense_copy(base)
        self.layer_paths = {container.layer_index: path for path, container in find_experts(base).items()}
        self.shared = [*find_shared_experts(base)]
        config = self.config(0, rank=None, shared=False)
        self.model = get_peft_model(base, config, adapter_name="a").eval()
        self.remember("a", config)
        self.reference.active = ["a"]
        self.pool: AdapterPool | None = None
        self.pooled: dict[str, DenseAdapter] = {}
        self.compiled: nn.Module | None = None
        self.hold = ExitStack()
        self.held: nn.Module | None = None
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")

    def config(self, number: int, rank: int | None, shared: bool, **settings) -> ESFTConfig:
        chosen = SELECTIONS[number % len(SELECTIONS)]
        target_experts = {self.layer_paths[i]: ids for i, ids in chosen.items() if i in self.layer_paths}
        target_experts = target_experts or {path: [3, 1] for path in self.layer_paths.values()}
        return ESFTConfig(
            target_experts=target_experts,
            rank=rank,
            alpha=None if rank is None else 2.0 * rank,
            train_shared_experts=shared and bool(self.shared),
            init_weights=False,
            **settings,
        )

    def remember(self, name: str, config: ESFTConfig) -> None:
        """Takes the first values of a new adapter, which are random, from the model."""
        experts = {**config.target_experts, **{path: [0] for path in self.shared}}
        self.reference.adapters[name] = read_adapter(self.model, name, experts, scaling=config.scaling)

    @property
    def adapters(self) -> list[str]:
        return [*self.reference.adapters]

    @property
    def free_names(self) -> list[str]:
        return [name for name in NAMES if name not in self.adapters]

    @property
    def own(self) -> list[str]:
        """Adapters that are not the pool's."""
        return [name for name in self.adapters if name not in self.pooled]

    @property
    def layers(self) -> list[ESFTLayer]:
        return [module for module in self.model.modules() if isinstance(module, ESFTLayer)]

    @property
    def is_trained(self) -> bool:
        active = self.reference.active
        return self.reference.is_enabled and any(layer.is_trained(name) for name in active for layer in self.layers)

    @property
    def can_mix(self) -> bool:
        return self.family != "listed"

    def pick(self, names: list[str], picks: list[int]) -> list[str]:
        return list(dict.fromkeys(names[pick % len(names)] for pick in picks))

    @rule(number=PICKS, rank=st.sampled_from([None, None, 2]), shared=st.booleans())
    @precondition(lambda self: self.free_names)
    def add_adapter(self, number, rank, shared):
        name = self.free_names[0]
        was_merged = bool(self.reference.merged)
        config = self.config(number, rank, shared)
        self.model.add_adapter(name, config)
        self.remember(name, config)
        self.has_added()
        expected = record_base(find_experts(self.reference.model), config.target_experts)
        found = self.model.peft_config[name].base_fingerprint
        assert found == expected or (was_merged and found is None)

    def has_added(self) -> None:
        """What PEFT does when an adapter is added: it sets the active ones again, which ends what is merged."""
        self.reference.unmerge()

    @rule(pick=PICKS)
    @precondition(lambda self: self.own and len(self.folders) < 4)
    def save(self, pick):
        (name,) = self.pick(self.own, [pick])
        folder = self.root / str(len(self.folders))
        self.model.save_pretrained(folder, selected_adapters=[name])
        found = folder if name == "default" else folder / name
        self.folders.append((found, copy.deepcopy(self.reference.adapters[name])))

    def loaded(self, saved: DenseAdapter, dtype: torch.dtype = torch.float32) -> DenseAdapter:
        """What an adapter is after it went through a file: its scale is not kept, nor are its deltas' dtypes."""
        dtype = self.reference.model.dtype if saved.is_frozen else dtype
        adapter = copy.deepcopy(saved).to(dtype)
        adapter.scale = 1.0
        return adapter

    @rule(pick=PICKS, is_trainable=st.booleans(), low_cpu_mem_usage=st.booleans())
    @precondition(lambda self: self.folders and self.free_names)
    def load(self, pick, is_trainable, low_cpu_mem_usage):
        name = self.free_names[-1]
        folder, saved = self.folders[pick % len(self.folders)]
        is_trainable = is_trainable and not saved.is_frozen
        self.model.load_adapter(str(folder), name, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage)
        self.reference.adapters[name] = self.loaded(saved)
        self.has_added()

    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    @precondition(lambda self: self.adapters)
    def set_adapter(self, picks):
        names = self.pick(self.adapters, picks)
        if len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(names)
        self.reference.unmerge()
        self.reference.active = names

    @rule(is_enabled=st.booleans())
    def enable_or_disable(self, is_enabled):
        tuner = self.model.base_model
        (tuner.enable_adapter_layers if is_enabled else tuner.disable_adapter_layers)()
        self.reference.is_enabled = is_enabled
        if not is_enabled:
            self.reference.unmerge()

    @rule(picks=st.none() | st.lists(PICKS, min_size=1, max_size=3), safe_merge=st.booleans())
    @precondition(lambda self: self.reference.is_enabled and self.adapters)
    def merge(self, picks, safe_merge):
        names = None if picks is None else self.pick(self.adapters, picks)
        self.model.merge_adapter(names, safe_merge=safe_merge)
        self.reference.merge(self.reference.active if names is None else names)

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.reference.unmerge()

    @rule(
        seed=PICKS,
        in_evaluation=st.booleans(),
        optimizer=st.sampled_from([{}, {"foreach": True}, {"fused": True}]),
        is_compiled=st.booleans(),
    )
    @precondition(lambda self: self.is_trained and not self.reference.merged and not self.is_held)
    def train_a_step(self, seed, in_evaluation, optimizer, is_compiled):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        reference = self.reference
        names = [n for n in reference.active if any(layer.is_trained(n) for layer in self.layers)]
        for name in names:
            reference.adapters[name] = reference.adapters[name].map(lambda t: t.clone().requires_grad_())
        tokens = random_tokens(2, 6, seed)
        self.model.train(not in_evaluation)
        task_loss(self.called(is_compiled)(input_ids=tokens)[0]).backward()
        loss = task_loss(reference(reference.weights(reference.active), input_ids=tokens))
        if loss.requires_grad:  # not if no token came to a selected expert that is a module of its own
            loss.backward()
        torch.optim.SGD(trained, lr=0.05, **optimizer).step()
        self.model.eval()
        for name in names:
            expected = reference.adapters[name].map(
                lambda t: t.detach() if t.grad is None else (t - 0.05 * t.grad).detach()
            )
            self.adopt_if_close(name, expected)
        for parameter in trained:
            parameter.grad = None

    def called(self, is_compiled: bool) -> nn.Module:
        """The model, or the same behind `torch.compile`: one for the whole sequence, whose graphs are used again."""
        if not (is_compiled and self.is_compilable):
            return self.model
        if self.compiled is None or self.compiled._orig_mod is not self.model:
            self.compiled = torch.compile(self.model, backend="eager")
        return self.compiled

    @rule(pick=PICKS, how=st.sampled_from(["data", "new_data", "copy", "vector", "foreach"]))
    @precondition(lambda self: self.live and not self.is_held)
    def write_deltas(self, pick, how):
        """What trainers, collectives and users do to deltas behind the layer's back."""
        name = self.live[pick % len(self.live)]
        parameters = [p for key, p in self.model.named_parameters() if ".esft_" in key and key.endswith(f".{name}")]
        with torch.no_grad():
            if how == "data":
                for parameter in parameters:
                    parameter.data.mul_(0.5)
            elif how == "new_data":
                for parameter in parameters:
                    parameter.data = parameter.data * 0.5
            elif how == "copy":
                for parameter in parameters:
                    parameter.copy_(parameter * 0.5)
            elif how == "vector":
                vector_to_parameters(parameters_to_vector(parameters) * 0.5, parameters)
            else:
                torch._foreach_mul_(parameters, 0.5)
        self.reference.adapters[name] = self.reference.adapters[name].map(lambda tensor: tensor * 0.5)

    @property
    def live(self) -> list[str]:
        """Adapters that have deltas."""
        return [name for name, adapter in self.reference.adapters.items() if not adapter.is_frozen and adapter.tensors]

    @rule(
        mode=st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]),
        picks=st.none() | st.lists(PICKS, min_size=1, max_size=2),
        is_interrupted=st.booleans(),
        is_compiled=st.booleans(),
    )
    def hold_for_some_calls(self, mode, picks, is_interrupted, is_compiled):
        """Several calls in a hold, with a switch of adapters between them."""
        call = self.called(is_compiled)
        try:
            with mode(), self.model.base_model.hold():
                self.check_outputs(call)
                if picks is not None and self.adapters:
                    self.set_adapter(picks)
                self.check_outputs(call)
                if is_interrupted:
                    raise InjectedError
        except InjectedError:
            pass

    @rule()
    @precondition(lambda self: self.held is None)
    def begin_a_hold(self):
        """All other operations may come within it, but for those that write to deltas behind the layers' back."""
        self.held = self.model
        self.hold.enter_context(self.model.base_model.hold())

    @rule()
    @precondition(lambda self: self.held is not None)
    def end_the_hold(self):
        self.hold.close()
        self.held = None

    @property
    def is_held(self) -> bool:
        """True in a hold of this model; a copy of a held one is not."""
        return self.held is self.model

    @rule()
    def generate(self):
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        tokens, reference = TOKENS[:2], self.reference
        mask = torch.ones_like(tokens)
        found = self.model.base_model.generate(
            input_ids=tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
        with torch.no_grad():
            expected = reference(reference.current_weights(), input_ids=found.sequences)
        expected = expected[:, tokens.shape[1] - 1 : -1]
        tolerance = 1e-4 if reference.model.dtype == torch.float32 else 0.1
        torch.testing.assert_close(torch.stack(found.logits, 1), expected.float(), rtol=tolerance, atol=tolerance)

    @rule(is_training=st.booleans())
    def call_under_autocast(self, is_training):
        """The values are rounded otherwise there; what is left behind is what counts."""
        reference = self.reference
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(is_training):
            found = self.model(input_ids=TOKENS)[0].detach()
            expected = reference(reference.current_weights(), input_ids=TOKENS).detach()
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)

    @rule()
    @precondition(lambda self: self.is_compilable)
    def call_compiled(self):
        with torch.no_grad():
            self.check_outputs(self.called(is_compiled=True))

    def adopt_if_close(self, name: str, expected: DenseAdapter) -> None:
        """Goes on with the model's values, which may differ from the reference's by rounding."""
        found = read_adapter(self.model, name, expected.experts)
        assert found.tensors.keys() == expected.tensors.keys()
        is_wide = self.reference.model.dtype == torch.float32
        for key, tensors in expected.tensors.items():
            for own, other in zip(found.tensors[key], tensors, strict=True):
                tolerance = 1e-5 if is_wide and own.dtype == torch.float32 else 0.02
                torch.testing.assert_close(own.float(), other.float(), rtol=tolerance, atol=tolerance)
        expected.tensors = found.tensors
        self.reference.adapters[name] = expected

    @rule(pick=PICKS)
    @precondition(lambda self: len(self.own) > 1)
    def delete(self, pick):
        (name,) = self.pick(self.own, [pick])
        if name in self.reference.merged:
            with pytest.raises(ValueError, match="while they are merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.reference.adapters[name]
        remaining = [other for other in self.reference.active if other != name]
        self.reference.active = remaining or sorted(self.adapters)[:1]
        if len(remaining) > 1 and self.model.active_adapter == name:
            # With several active adapters PEFT goes on with the deleted one's name, and fails in the next call.
            self.model.active_adapter = remaining[0]

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def switch_dtype(self, dtype):
        self.model.to(dtype)
        self.reference.to(dtype)

    @rule(pick=PICKS, folder_pick=PICKS)
    @precondition(lambda self: self.own and self.folders)
    def hotswap(self, pick, folder_pick):
        (name,) = self.pick(self.own, [pick])
        folder, saved = self.folders[folder_pick % len(self.folders)]
        if name in self.reference.merged:
            with pytest.raises(ValueError, match="is merged"):
                hotswap_adapter(self.model, folder, name)
            return
        hotswap_adapter(self.model, folder, name)
        before = self.reference.adapters[name]
        kept = [torch.float32] if before.is_frozen else [t.dtype for own in before.tensors.values() for t in own]
        self.reference.adapters[name] = self.loaded(saved, kept[0])
        self.has_added()

    @rule(pick=PICKS)
    @precondition(lambda self: self.own)
    def freeze(self, pick):
        (name,) = self.pick(self.own, [pick])
        if self.reference.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.base_model.freeze_adapter(name)
            return
        self.model.base_model.freeze_adapter(name)
        if not self.reference.adapters[name].is_frozen or self.reference.adapters[name].scale != 1:
            self.reference.freeze(name)

    @rule(pick=PICKS, scale=st.sampled_from([0.0, 0.5, 1.0, -2.0]))
    @precondition(lambda self: self.own)
    def set_scale(self, pick, scale):
        (name,) = self.pick(self.own, [pick])
        if name in self.reference.merged:
            with pytest.raises(ValueError, match="is merged"):
                self.model.base_model.set_scale(name, scale)
            return
        self.model.base_model.set_scale(name, scale)
        self.reference.adapters[name].scale = scale

    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    @precondition(lambda self: self.free_names)
    def add_weighted_adapter(self, picks):
        name = self.free_names[0]
        names = self.pick(self.adapters, picks)
        factors = [1.0, 0.5, -0.25][: len(names)]
        self.model.base_model.add_weighted_adapter(names, factors, name)
        self.adopt_if_close(name, self.reference.combine(names, factors))
        self.has_added()

    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    def mixed_forward(self, picks):
        everyone = [*self.adapters, "__base__"]
        names = [everyone[pick % len(everyone)] for pick in picks]
        tokens = TOKENS[: len(names)]
        if self.reference.merged:
            with pytest.raises(ValueError, match="merged adapters"), torch.no_grad():
                self.model(input_ids=tokens, adapter_names=names)
            return
        if not self.can_mix:
            with pytest.raises(ValueError, match="is called expert by expert"), torch.no_grad():
                self.model(input_ids=tokens, adapter_names=names)
            return
        with torch.no_grad():
            found = self.model(input_ids=tokens, adapter_names=names)[0]
        for number, name in enumerate(names):
            is_base = name == "__base__" or not self.reference.is_enabled
            weights = {} if is_base else self.reference.weights([name])
            with torch.no_grad():
                expected = self.reference(weights, input_ids=tokens[number : number + 1])[0]
            tolerance = 1e-4 if found.dtype == torch.float32 else 0.1
            torch.testing.assert_close(found[number], expected, rtol=tolerance, atol=tolerance)

    @rule(
        pick=PICKS,
        where=st.sampled_from(["embed_tokens", "layers.0", "layers.1.mlp", "norm"]),
        error=st.sampled_from([InjectedError, KeyboardInterrupt]),
        how=st.sampled_from(["plain", "mixed", "disabled", "training"]),
    )
    def raise_in_the_middle(self, pick, where, error, how):
        def fail(*_):
            raise error

        inner = self.model.get_base_model().model.get_submodule(where)
        handle = inner.register_forward_hook(fail)
        try:
            if how == "disabled":
                # What is merged ends with it, as in PEFT.
                with pytest.raises(error), self.model.disable_adapter():
                    self.model(input_ids=TOKENS)
                self.reference.unmerge()
            elif how == "mixed" and self.can_mix and not self.reference.merged:
                with pytest.raises(error):
                    self.model(input_ids=TOKENS, adapter_names=[self.adapters[pick % len(self.adapters)]] * 3)
            else:
                with pytest.raises(error):
                    self.model.train(how == "training")(input_ids=TOKENS)
        finally:
            handle.remove()
            self.model.eval()

    @rule(pick=PICKS, folder_pick=PICKS)
    @precondition(lambda self: self.folders and self.can_mix and not self.reference.merged)
    def use_the_pool(self, pick, folder_pick):
        if self.pool is None:
            self.pool = AdapterPool(self.model, 10**8)
        name = f"pool{pick % 3}"
        if name not in self.pool:
            folder, saved = self.folders[folder_pick % len(self.folders)]
            self.pool.add(name, folder)
            self.pooled[name] = copy.deepcopy(saved)
        with self.pool.using(name):
            if name not in self.adapters:
                self.reference.adapters[name] = self.loaded(self.pooled[name])
                if not self.reference.adapters[name].is_frozen:
                    self.reference.freeze(name)
            self.check_adapters()

    @property
    def droppable(self) -> list[str]:
        return [name for name in self.adapters if name in self.pooled and name not in self.reference.active]

    @rule(pick=PICKS)
    @precondition(lambda self: self.droppable and not self.reference.merged)
    def drop_from_the_pool(self, pick):
        (name,) = self.pick(self.droppable, [pick])
        self.pool.drop(name)
        del self.reference.adapters[name]

    @rule()
    @precondition(lambda self: self.pool is None)
    def copy_the_model(self):
        self.model = copy.deepcopy(self.model)

    @rule()
    def load_the_state(self):
        self.model.load_state_dict({key: value.clone() for key, value in self.model.state_dict().items()})

    @rule(safe_merge=st.booleans(), should_merge=st.booleans())
    @precondition(lambda self: self.pool is None and self.reference.is_enabled and len(self.reference.active) == 1)
    def unload_and_wrap_again(self, safe_merge, should_merge):
        reference = self.reference
        if should_merge:
            base = self.model.merge_and_unload(safe_merge=safe_merge)
            reference.merge(reference.active)
        else:
            self.model.unmerge_adapter()
            reference.unmerge()
            base = self.model.unload()
        with torch.no_grad():
            for name, weight in reference.merged_weights.items():
                reference.model.get_parameter(name).copy_(weight)
        reference.unmerge()
        reference.adapters = {}
        config = self.config(0, rank=None, shared=False)
        self.model = get_peft_model(base, config, adapter_name="a").eval()
        self.remember("a", config)
        reference.active = ["a"]
        # Those that were saved hold differences from another base, or rows of it, which are refused or warned of.
        self.folders = [(folder, saved) for folder, saved in self.folders if not saved.is_frozen]

    def check_adapters(self) -> None:
        """The adapters and their tensors are the reference's."""
        assert set(self.model.peft_config) == set(self.adapters)
        for name, adapter in self.reference.adapters.items():
            found = read_adapter(self.model, name, adapter.experts)
            assert found.tensors.keys() == adapter.tensors.keys()
            for key, tensors in adapter.tensors.items():
                assert all(torch.equal(a, b) for a, b in zip(found.tensors[key], tensors, strict=True)), (name, key)

    def check_base(self) -> None:
        """The base's parameters are the reference's, bit for bit."""
        found = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in self.model.named_parameters()
            if ".esft_" not in name
        }
        expected = self.reference.parameters()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    @invariant()
    def equals_the_reference(self):
        type(self).operations += 1
        self.check_adapters()
        self.check_base()
        assert all(layer.disable_adapters != self.reference.is_enabled for layer in self.layers)
        assert self.model.active_adapters == self.reference.active
        assert all(layer.active_adapters == self.reference.active for layer in self.layers)
        assert all(layer.merged_adapters == self.reference.merged for layer in self.layers)
        mode = [torch.no_grad, torch.inference_mode, torch.enable_grad][self.operations % 3]
        with mode():
            self.check_outputs(self.model)

    def check_outputs(self, call: nn.Module) -> None:
        found = call(input_ids=TOKENS)[0].detach()
        with torch.no_grad():
            expected = self.reference(self.reference.current_weights(), input_ids=TOKENS)
        assert torch.equal(found, expected), (found - expected).abs().max()

    def teardown(self):
        try:
            self.hold.close()
            if self.pool is not None:
                self.pool.close()
            self.model.unmerge_adapter()
            self.reference.unmerge()
            base = self.model.unload()
            state = dict(base.named_parameters())
            for name, value in self.reference.model.named_parameters():
                assert torch.equal(state[name], value), name
        finally:
            self.warnings.__exit__(None, None, None)
            shutil.rmtree(self.root)


def run(family: str, examples: int, steps: int, **attributes: object) -> int:
    """Runs the machine on a family; returns how many operations it took, all examples together."""
    machine = type("WholeModel", (WholeModel,), {"family": family, "operations": 0, **attributes})
    options = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)
    return machine.operations


@pytest.mark.parametrize("family", ["olmoe", "listed"])
def test_some_sequences_of_operations(family):
    assert run(family, examples=6, steps=30) > 150


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_thousand_operations(family):
    # Fewer operations apply to lists of experts, so its sequences are shorter.
    assert run(family, examples=140 if family == "listed" else 150, steps=50) >= 5000


@pytest.mark.slow
def test_compiled_calls_among_the_operations():
    torch._dynamo.reset()
    assert run("olmoe", examples=8, steps=30, is_compilable=True) >= 240
