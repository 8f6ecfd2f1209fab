"""Whatever is done with adapters over experts in few bits equals the same over dense experts, bit for bit."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_esft import find_experts
from peft_esft.moe.quantised_formats import ENCODERS
from peft_esft.moe.stored_rows import StoredRows
from peft_esft.ops.frozen_store import FrozenStore

from families import tiny_model
from oracle import config_for, deltas_of, random_tokens, task_loss
from stored_bases import dense_twin, quantised, same_bits


LAYOUTS = ["olmoe", "gpt_oss", "nemotron_h", "muse_spark"]
"""Plain; transposed, with biases, gate and up interleaved; without a gate; with a norm behind each expert."""
FORMS = [(4, "nf4"), (4, "fp4"), (4, "nf4 double"), (8, "nf4")]
OPERATIONS = ["train", "merge", "merge both", "unmerge", "switch", "both", "disable", "mixed", "save", "load", "hold"]
KEPT = [5, 2]  # of which one is trained


class Pair:
    """A model over experts in few bits, and one over dense experts of the same numbers; all is done with both."""

    def __init__(self, layout: str, form: tuple[int, str], dtype: torch.dtype, keeps: bool, folder: Path) -> None:
        plain = tiny_model(layout, dtype)
        kept = dict.fromkeys(find_experts(plain), KEPT) if keeps else None
        self.base = quantised(copy.deepcopy(plain), *form, keep=kept)
        self.models = [self._adapted(model) for model in (self.base, dense_twin(plain, self.base))]
        self.stored = {name: tensor.clone() for name, tensor in self.base.state_dict().items() if "stored_" in name}
        self.folder, self.is_exact = folder, dtype != torch.float32
        self.merged: list[str] = []
        self.active = ["default"]
        self.steps = 0

    @staticmethod
    def _adapted(model: nn.Module) -> PeftModel:
        torch.manual_seed(1)
        wrapped = get_peft_model(model, config_for(model, init_weights=False))
        wrapped.add_adapter("other", config_for(model, [6, 2], init_weights=False))
        return wrapped.eval()

    def do(self, operation: str) -> None:
        """Carries an operation out on both models."""
        if operation in ("disable", "hold"):
            contexts = [m.disable_adapter() if operation == "disable" else m.base_model.hold() for m in self.models]
            with contexts[0], contexts[1]:
                self.compare()
        elif operation == "mixed" and not self.merged:
            self.compare(adapter_names=["other", "__base__"])
        elif operation != "mixed":
            for number, model in enumerate(self.models):
                getattr(self, operation.replace(" ", "_"))(model, self.folder / str(number))
        if operation in ("train", "unmerge", "disable", "load", "switch", "both"):
            self.merged = []
        if operation in ("switch", "both"):
            self.active = ["other"] if operation == "switch" and self.active == ["default"] else ["default"]
            self.active = ["default", "other"] if operation == "both" else self.active
        if operation.startswith("merge"):
            self.merged = ["default", "other"] if operation == "merge both" else self.active
        self.steps += operation == "train"

    def train(self, model: PeftModel, folder: Path) -> None:
        self.unmerge(model, folder)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        task_loss(model(input_ids=random_tokens(seed=self.steps))[0]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def merge(self, model: PeftModel, folder: Path) -> None:
        self.unmerge(model, folder)
        model.merge_adapter()

    def merge_both(self, model: PeftModel, folder: Path) -> None:
        self.unmerge(model, folder)
        model.merge_adapter(["default", "other"])

    def unmerge(self, model: PeftModel, folder: Path) -> None:
        if self.merged:
            model.unmerge_adapter()

    def switch(self, model: PeftModel, folder: Path) -> None:
        self.unmerge(model, folder)
        model.set_adapter("other" if self.active == ["default"] else "default")

    def both(self, model: PeftModel, folder: Path) -> None:
        self.unmerge(model, folder)
        model.base_model.set_adapter(["default", "other"])

    def save(self, model: PeftModel, folder: Path) -> None:
        model.save_pretrained(folder, selected_adapters=["default"])

    def load(self, model: PeftModel, folder: Path) -> None:
        if not (folder / "adapter_config.json").exists():
            self.save(model, folder)
        self.unmerge(model, folder)
        model.load_adapter(str(folder), "default", is_trainable=True)
        model.base_model.set_adapter(self.active)

    @torch.no_grad()
    def compare(self, **inputs: object) -> None:
        """The outputs are equal: in fp32 up to the last bit, which depends on where operands lie in memory."""
        own, twin = (model(input_ids=random_tokens(), **inputs)[0] for model in self.models)
        if self.is_exact:
            assert same_bits(own, twin)
        else:
            torch.testing.assert_close(own, twin, rtol=1e-3, atol=1e-4)

    def check_base(self) -> None:
        """After unmerging, the quantised base is bit for bit what it was."""
        for model in self.models:
            self.unmerge(model, self.folder)
        now = {name: tensor for name, tensor in self.base.state_dict().items() if "stored_" in name}
        assert now.keys() == self.stored.keys()
        assert all(same_bits(tensor, self.stored[name]) for name, tensor in now.items())


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    keeps=st.booleans(),
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=8),
)
def test_any_sequence_equals_that_over_the_dense_base(
    layout: str, form: tuple[int, str], dtype: torch.dtype, keeps: bool, operations: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(layout, form, dtype, keeps, Path(folder))
        for operation in operations:
            pair.do(operation)
            pair.compare()
        own, twin = map(deltas_of, pair.models)
        assert own
        if pair.is_exact:
            assert all(same_bits(delta, twin[key]) for key, delta in own.items())
        pair.check_base()
        pair.models = [model.merge_and_unload() for model in pair.models]
        pair.compare()
        merged = pair.models[0]
        merged.save_pretrained(Path(folder) / "merged")
        again = type(merged).from_pretrained(Path(folder) / "merged", dtype=dtype).state_dict()
        state = {name: tensor for name, tensor in merged.state_dict().items() if "stored_" in name}
        assert all(same_bits(again[name], tensor) for name, tensor in state.items())


ROWS = st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, 9), st.integers(1, 130)))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(ENCODERS)),
    shape=ROWS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1000.0]),
    data=st.data(),
)
def test_a_stored_weight_reads_like_the_tensor_it_stands_for(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, scale: float, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(shape) * scale).to(dtype)
    stored = StoredRows.encoded(ENCODERS[name], rows)
    expected = torch.stack([stored()[expert] for expert in range(shape[0])])
    assert expected.isfinite().all() and same_bits(expected, expected.clone())
    before = {key: tensor.clone() for key, tensor in stored.state_dict().items()}
    original = expected.clone()
    for _ in range(data.draw(st.integers(0, 4))):
        ids = data.draw(st.lists(st.integers(0, shape[0] - 1), unique=True, max_size=shape[0]))
        new = torch.randn(len(ids), *shape[1:]).to(dtype)
        stored.write(ids, new)
        for expert, row in zip(ids, new, strict=True):
            expected[expert] = row
        _check_reads(stored, expected, ids)
    stored.write(range(shape[0]), original)
    assert not stored.kept_ids and stored.state_dict().keys() == before.keys()
    assert all(same_bits(stored.state_dict()[key], tensor) for key, tensor in before.items())


def _check_reads(stored: StoredRows, expected: Tensor, ids: list[int]) -> None:
    store = stored()
    flipped = store.transpose(1, 2)
    assert flipped.shape == expected.transpose(1, 2).shape
    for expert, row in enumerate(expected):
        assert same_bits(store[expert], row) and same_bits(flipped[expert].T, row)
    index = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(store.index_select(0, index), expected[index])
    assert torch.equal(flipped.index_select(0, index), expected[index].transpose(1, 2))


def test_no_experts_at_all_are_not_decoded_on_an_accelerator() -> None:
    """A forward pass without trained experts asks for the matrices of none, which a form need not have."""

    def decode(experts: slice | Tensor) -> Tensor:
        return torch.stack([torch.empty(2, 3, device="meta") for _ in experts])

    store = FrozenStore(torch.Size((4, 2, 3)), torch.float32, torch.device("meta"), decode)
    assert store.index_select(0, torch.tensor([], dtype=torch.int64)).shape == (0, 2, 3)
    assert store.index_select(0, torch.tensor([1, 2])).shape == (2, 2, 3)
