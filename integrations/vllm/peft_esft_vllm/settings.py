"""The setting `esft` in vLLM's `additional_config`: how many experts an adapter may train in each layer."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapter_file import WEIGHTS, read_config


@dataclass(frozen=True)
class Settings:
    """How many rows of experts each slot has.

    Attributes:
        experts: in every layer, at least.
        widths: by layer number, where there are more.
    """

    experts: int
    widths: dict[int | None, int]

    def width(self, path: str) -> int:
        """The rows of one slot in the layer of an experts module."""
        return max(self.experts, self.widths.get(layer_number(path), 0))

    def check(self, folder: Path) -> None:
        """Checks that an adapter can be served and fits into a slot, from its config alone.

        Raises:
            ValueError: if it trains too many experts of a layer, and what `read_config` raises.
        """
        for path, ids in read_config(folder)["target_experts"].items():
            if len(ids) > self.width(path):
                raise ValueError(
                    f"{folder} trains {len(ids)} experts of {path}: 'esft' has room for {self.width(path)}"
                )
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder} has no {WEIGHTS}")


def settings_of(vllm_config: Any) -> Settings | None:
    """The settings of an engine; None if it does not serve ESFT adapters.

    Raises:
        ValueError: if the setting is malformed.
    """
    extra = vllm_config.additional_config
    given = extra.get("esft") if isinstance(extra, dict) else None
    return None if given is None else _parse(json.dumps(given))


def layer_number(path: str) -> int | None:
    """The number of a module's layer. vLLM's and transformers' paths differ, but both count layers alike."""
    found = [int(part) for part in path.split(".") if part.isdecimal()]
    return found[0] if len(found) == 1 else None


@functools.lru_cache
def _parse(text: str) -> Settings:
    given = json.loads(text)
    experts, folders = (given.get("experts", 0), given.get("adapters", [])) if isinstance(given, dict) else (None, [])
    if type(experts) is not int or type(folders) is not list or given.keys() - {"experts", "adapters"}:
        raise ValueError(
            f"additional_config has 'esft': {text}. It takes 'experts', the largest number of experts that an adapter "
            "trains in one layer, and 'adapters', a list of folders whose adapters must fit"
        )
    widths: dict[int | None, int] = {}
    for folder in folders:
        for path, ids in read_config(Path(folder))["target_experts"].items():
            widths[layer_number(path)] = max(len(ids), widths.get(layer_number(path), 0))
    if max([experts, *widths.values()]) < 1:
        raise ValueError(f"additional_config has 'esft': {text}, which leaves no room for any expert")
    return Settings(experts, widths)
