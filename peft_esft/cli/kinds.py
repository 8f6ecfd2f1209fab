"""Tells what a path is that a command was given, and refuses one that is not what the command takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal


Kind = Literal["model", "config", "adapter", "other adapter", "scores", "original", "data", "nothing"]
"""`model`: a folder with `config.json`; `config`: such a file; `adapter`: the folder of an ESFT adapter;
`other adapter`: that of another PEFT adapter; `original`: files of the original code; `nothing`: none of these."""

NAMES: dict[Kind, str] = {
    "model": "a model",
    "config": "the config of a model",
    "adapter": "an ESFT adapter",
    "other adapter": "a PEFT adapter",
    "scores": "a file of scores",
    "original": "files of the original code",
    "data": "a file of samples",
}
ADAPTER_CONFIG, MODEL_CONFIG, EXPERT_CFG = "adapter_config.json", "config.json", "expert_cfg.json"
TRAIN_REPORT = "train_report.json"
"""What `peft-esft train` writes beside the adapter."""
MAX_BYTES = 50_000_000


def check_kinds(options: argparse.Namespace) -> None:
    """Checks the paths of a command against `options.kinds`, which names the kinds for the options that have some.

    Raises:
        ValueError: if a path is of another kind or missing; it says what the path is and what was expected.
    """
    kinds: dict[str, tuple[Kind, ...]] = getattr(options, "kinds", {})
    for name, wanted in kinds.items():
        value = getattr(options, name, None)
        for path in value if isinstance(value, list) else [value]:
            if path is not None:
                check_kind(str(path), wanted)


def check_kind(name: str, wanted: Sequence[Kind]) -> None:
    """Checks one path or Hub name, or the one in `NAME=PATH`.

    Raises:
        ValueError: if it is of another kind or missing.
    """
    name = name if Path(name).exists() else name.rpartition("=")[2]
    path = Path(name)
    if not path.exists():
        _check_hub_name(name, wanted)
        return
    kind, what = kind_of(path)
    if kind in wanted:
        return
    if kind == "adapter" and "original" in wanted:
        raise ValueError(f"{name} is an ESFT adapter already")
    takes = " or ".join(NAMES[kind] for kind in wanted if kind in NAMES)
    raise ValueError(f"{name} is {what}, not {takes}{_remedy(path, kind, wanted)}")


def kind_of(path: Path) -> tuple[Kind, str]:
    """What a file or folder is: its kind, and in words."""
    if path.is_dir():
        if (path / ADAPTER_CONFIG).exists():
            fields = _json(path / ADAPTER_CONFIG)
            own = str(fields.get("peft_type"))[:40] if isinstance(fields, dict) else "malformed"
            return (
                ("adapter", NAMES["adapter"]) if own == "ESFT" else ("other adapter", f"a PEFT adapter of type {own}")
            )
        if (path / MODEL_CONFIG).exists():
            return "model", NAMES["model"]
        if (path / EXPERT_CFG).exists():
            return "original", NAMES["original"]
        return "nothing", f"a folder without {MODEL_CONFIG} and {ADAPTER_CONFIG}"
    if path.suffix == ".json":
        content = _json(path)
        if isinstance(content, dict) and "containers" in content:
            return "scores", NAMES["scores"]
        if isinstance(content, dict) and ("model_type" in content or "architectures" in content):
            return "config", NAMES["config"]
        return "nothing", "a JSON file"
    return "data", "a file"


def base_of(adapter: Path) -> str | None:
    """The base that an adapter's config names."""
    fields = _json(adapter / ADAPTER_CONFIG)
    return fields.get("base_model_name_or_path") if isinstance(fields, dict) else None


def _remedy(path: Path, kind: Kind, wanted: Sequence[Kind]) -> str:
    if kind in ("adapter", "other adapter") and "model" in wanted:
        base = base_of(path)
        return f"; give its base: {base}" if base else "; give its base"
    if kind == "original":
        return "; make an adapter of them: peft-esft import"
    if kind == "config" and "model" in wanted:
        return "; give its folder"
    if kind in ("nothing", "data") and "scores" in wanted:
        return "; peft-esft score writes one"
    return ""


def _check_hub_name(name: str, wanted: Sequence[Kind]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file = MODEL_CONFIG if "model" in wanted else ADAPTER_CONFIG
    is_name, where = name.count("/") <= 1 and not name.startswith((".", "/", "~")), ""
    if is_name and {"model", "adapter"} & set(wanted):
        try:
            if not constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, file), str):
                return
            where = f", and no such {'model' if 'model' in wanted else 'adapter'} in the Hub's cache (offline)"
        except HFValidationError:
            pass
    folder = Path(name).parent
    near = get_close_matches(Path(name).name, [p.name for p in folder.iterdir()], 1) if folder.is_dir() else []
    hint = f"; did you mean {folder / near[0]}?" if near else ""
    what = "file" if Path(name).suffix or set(wanted) == {"scores"} else "folder"
    raise ValueError(f"there is no {what} {name!r}{where}{hint}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
