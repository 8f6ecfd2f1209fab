"""Translates the paths of an adapter that was trained over another class of the same checkpoint.

The classes of a checkpoint (the whole model, its text part, one without a head) hold the same modules under paths that
begin differently: `model.language_model.layers.3.mlp.experts`, `model.layers.3.mlp.experts`, `layers.3.mlp.experts`.
From the list of layers on the paths are equal, in all architectures of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import TypeVar

from .adapter_file import DELTA_KEY, KEY_PREFIX


T = TypeVar("T")
Prefixes = dict[str, str]
"""The beginning of paths in the class that an adapter was trained with, and their beginning in this class."""


def matching_paths(path: str, paths: Iterable[str]) -> list[str]:
    """Finds the paths that mean the same module as a path of another class: those with the longest common ending.

    Returns:
        More than one path if several have an equally long common ending. None if no common ending reaches back to the
        list of layers.
    """
    lengths = {own: _common_ending(path, own) for own in paths}
    longest = max(lengths.values(), default=0)
    return [own for own, length in lengths.items() if length == longest > 0]


def _common_ending(first: str, second: str) -> int:
    """How many parts two paths have in common at the end; 0 if the lists of layers are not among them."""
    parts = [first.split("."), second.split(".")]
    pairs = zip(*map(reversed, parts), strict=False)
    length = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    needed = [len(own) - next((place for place, part in enumerate(own) if part.isdigit()), 0) + 1 for own in parts]
    return length if length >= max(needed) else 0


def find_prefixes(paths: Iterable[str], own_paths: Iterable[str]) -> Prefixes:
    """Finds how the paths of another class have to change.

    Args:
        paths: of an adapter, experts among them.
        own_paths: of the experts in the model at hand.

    Returns:
        For example `{"model.": "model.language_model."}`. Empty if all experts have the paths that they have here.
    """
    own_paths = list(own_paths)
    prefixes: Prefixes = {}
    for path in paths:
        matches = [path] if path in own_paths else matching_paths(path, own_paths)
        if len(matches) == 1 and matches != [path]:
            shared = _common_ending(path, matches[0])
            before, now = ("".join(f"{part}." for part in own.split(".")[:-shared]) for own in (path, matches[0]))
            prefixes[before] = now
    return prefixes


def moved(path: str, prefixes: Prefixes) -> str:
    """A path of another class as it is here."""
    before = max((start for start in prefixes if path.startswith(start)), key=len, default=None)
    # The number of a layer, which may stand instead of a path, is the same in all classes.
    return path if before is None or path.isdigit() else prefixes[before] + path.removeprefix(before)


def moved_keys(entries: Mapping[str, T], prefixes: Prefixes) -> dict[str, T]:
    """What belongs to the keys of an adapter's file, by the keys that the file would have here."""
    result = {}
    for key, entry in entries.items():
        start = KEY_PREFIX if key.startswith(KEY_PREFIX) else ""
        result[start + moved(key.removeprefix(start), prefixes)] = entry
    return result


def paths_of_deltas(keys: Iterable[str]) -> list[str]:
    """The modules whose changes are among the keys of an adapter's file."""
    paths = (key.removeprefix(KEY_PREFIX).rpartition(DELTA_KEY)[0] for key in keys if DELTA_KEY in key)
    return list(dict.fromkeys(paths))
