"""The bank of resident rows against a plain dict."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_esft.tuner.layers.resident import RowBank


KEYS = ["a", "b", "c", "d"]
operations = st.lists(
    st.tuples(st.sampled_from(["put", "put", "put", "remove", "compact", "hold"]), st.sampled_from(KEYS)),
    max_size=30,
)


def rows_of(number: int, num_rows: int) -> dict[str, torch.Tensor]:
    return {"up": torch.full((num_rows, 2, 3), float(number)), "down": torch.full((num_rows, 4), -float(number))}


@settings(max_examples=200)
@given(operations, st.randoms(use_true_random=False))
def test_rows_are_what_was_put_last_and_whoever_holds_some_keeps_them(steps, random):
    bank, expected, held = RowBank(), {}, []
    for number, (operation, name) in enumerate(steps, start=1):
        key = (name,)
        if operation == "put":
            size = random.randint(1, 4)
            bank.put(key, tuple(range(size)), rows_of(number, size), number, [])
            expected[key] = (number, size)
        elif operation == "remove":
            bank.remove(key)
            expected.pop(key, None)
        elif operation == "compact":
            bank.compact()
            assert bank.gap_nbytes == 0
        elif operation == "hold" and key in expected:
            held.append((bank.residents[key], expected[key]))
        now = [(resident, expected[key]) for key, resident in bank.residents.items()]
        assert bank.residents.keys() == expected.keys()
        for resident, (value, size) in [*now, *held]:
            for own, reference in zip(resident.rows.values(), rows_of(value, size).values(), strict=True):
                assert torch.equal(own, reference)
        for resident, _ in now:
            place = slice(resident.place.start, resident.place.stop)
            assert all(torch.equal(bank.tensors[weight][place], own) for weight, own in resident.rows.items())


def test_nothing_is_padded_and_gaps_are_filled():
    bank = RowBank()
    for number, size in enumerate([3, 1, 5]):
        bank.put((str(number),), tuple(range(size)), rows_of(number, size), None, [])
    assert bank.capacity == 9
    assert bank.nbytes == 9 * (6 + 4) * 4
    bank.remove(("0",))
    assert bank.gap_nbytes == 3 * (6 + 4) * 4
    before = bank.tensors
    bank.put(("3",), (0, 1, 2), rows_of(3, 3), None, [])
    assert bank.tensors is before and bank.gap_nbytes == 0
    bank.remove(("3",))
    bank.put(("4",), (0, 1, 2, 3), rows_of(4, 4), None, [])
    assert bank.capacity == 10 and bank.gap_nbytes == 0


def test_the_first_rows_become_the_bank():
    rows = rows_of(1, 3)
    resident = RowBank().put(("a",), (4, 2, 9), rows, None, [])
    assert all(resident.rows[name] is tensor for name, tensor in rows.items())


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda tensor: tensor.to("meta")])
def test_rows_of_another_kind_begin_a_new_bank(change):
    bank = RowBank()
    bank.put(("a",), (0,), rows_of(1, 1), None, [])
    bank.put(("b",), (0,), {name: change(tensor) for name, tensor in rows_of(2, 1).items()}, None, [])
    assert bank.residents.keys() == {("b",)}


def test_a_copied_bank_is_empty():
    bank = RowBank()
    bank.put(("a",), (0,), rows_of(1, 1), None, [])
    assert copy.deepcopy(bank).residents == {}
