"""The model card that goes with a saved adapter: what it is, for which base, how it was chosen, how to load it."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

from .adapter_file import MARK
from .checks import find_header
from .targets import adapted_selection
from .tensor_files import TensorEntry


if TYPE_CHECKING:
    from .config import ESFTConfig


CARD_NAME, PICTURE_NAME = "README.md", "experts.png"
BEGIN, END = "<!-- peft_esft: written anew at every save -->", "<!-- /peft_esft -->"
TAGS = ("esft", "peft", "mixture-of-experts")
BASE_TAG = "base_model:adapter:"
CHOICE = ("metric", "top_p", "top_k", "budget", "min_experts", "max_experts", "averaging", "num_tokens", "num_samples")
UNFILLED = "[More Information Needed]"
STORAGE = {
    "delta": "fp32 deltas, which can be trained further",
    "rows": "effective weights, for inference",
    "int8": "deltas of 8 bits, for inference",
    "int4": "deltas of 4 bits, for inference",
    "int1": "deltas of 1 bit, for inference",
}
CELL, TRAINED, FROZEN, GAP = 8, (31, 119, 180), (225, 225, 225), (255, 255, 255)


def write_card(folder: Path, config: ESFTConfig, name: str = "name or folder of this adapter") -> None:
    """Writes or updates `README.md` and `experts.png` beside an adapter's weights; nothing if there are none.

    A card that someone has filled in is kept: only the part between two comments is written anew. The form that PEFT
    leaves to be filled in is replaced.

    Args:
        folder: of the adapter.
        config: its config.
        name: by which it is to be loaded.
    """
    header = find_header(folder, pickled=True)
    if header is None:
        return
    file, size = folder / CARD_NAME, (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    card = ModelCard.load(file) if file.exists() else ModelCard("---\n{}\n---\n")
    _fill_metadata(card.data, config)
    body = f"{BEGIN}\n{_body(config, header, size, name)}\n{END}"
    card.text = _with_body(card.text, body)
    card.save(file)
    selection = adapted_selection(config)
    if selection:
        (folder / PICTURE_NAME).write_bytes(_picture(selection, num_experts_of(config)))


def is_hub_name(name: str | None) -> bool:
    """True for a name that the Hub accepts as that of a model, which a path of this machine is not."""
    return (
        bool(name)
        and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name or "") is not None
        and not Path(name or "").exists()
    )


def _fill_metadata(data: Any, config: ESFTConfig) -> None:
    data["library_name"] = "peft"
    tags = {*(data.get("tags") or []), *TAGS}
    if is_hub_name(config.base_model_name_or_path):
        data["base_model"] = config.base_model_name_or_path
        data["base_model_relation"] = "adapter"
        tags = {tag for tag in tags if not tag.startswith(BASE_TAG)} | {f"{BASE_TAG}{config.base_model_name_or_path}"}
    data["tags"] = sorted(tags)
    if config.task_type == "CAUSAL_LM" and not data.get("pipeline_tag"):
        data["pipeline_tag"] = "text-generation"


def _with_body(text: str, body: str) -> str:
    if BEGIN in text and END in text:
        return f"{text[: text.index(BEGIN)]}{body}{text[text.index(END) + len(END) :]}"
    versions = text[text.index("### Framework versions") :] if "### Framework versions" in text else ""
    if UNFILLED in text or not text.strip():
        return f"\n{body}\n\n{versions}\n" if versions else f"\n{body}\n"
    return f"{text.rstrip()}\n\n{body}\n"


def _body(config: ESFTConfig, header: dict[str, TensorEntry], size: int, name: str) -> str:
    base = config.base_model_name_or_path or "an unnamed base"
    selection = adapted_selection(config)
    trained = ["the experts below"] * bool(selection) + ["the modules named below"] * bool(_trained_besides(config))
    parts = [
        f"# ESFT adapter for {_code(base)}",
        "Expert-Specialized Fine-Tuning ([arXiv 2407.01906](https://arxiv.org/abs/2407.01906)): only "
        f"{' and '.join(trained)} were trained, everything else is the base's.",
        _table(("", ""), [("base", _code(base)), *_facts(config, header, size, selection)]),
        "## Use",
        _usage(config, name),
        "## Trained experts",
    ]
    if selection:
        total = num_experts_of(config)
        rows = [
            (
                _code(path),
                f"{len(ids)}" + (f" of {total[path]}" if path in total else ""),
                ", ".join(map(str, sorted(ids))),
            )
            for path, ids in selection.items()
        ]
        parts += [
            f"![Trained experts, a row for each layer and a column for each expert]({PICTURE_NAME})",
            _table(("layer", "experts", "ids"), rows),
        ]
    return "\n\n".join(parts)


def _facts(
    config: ESFTConfig, header: dict[str, TensorEntry], size: int, selection: Mapping[str, list[int]]
) -> list[tuple[str, str]]:
    facts = [
        ("revision", revision_of(config)),
        ("task type", config.task_type),
        ("task", (config.selection or {}).get("task")),
    ]
    facts.append(("experts chosen by", describe_choice(config)))
    experts = sum(map(len, selection.values()))
    facts.append(("trained experts", f"{experts} in {len(selection)} layers" if experts else None))
    facts.append(("trained besides", ", ".join(_trained_besides(config)) or None))
    facts.append(("stored as", describe_storage(config)))
    tensors = sum(MARK in key for key in header)
    facts.append(("file", f"{size / 1e6:.2f} MB, {tensors} tensors"))
    return [(name, _code(value) if name == "revision" else str(value)) for name, value in facts if value is not None]


def revision_of(config: ESFTConfig) -> str | None:
    """The revision of the base: the one that was asked for, or the commit that was loaded."""
    return config.revision or (config.base_fingerprint or {}).get("commit")


def _trained_besides(config: ESFTConfig) -> list[str]:
    kinds = {"train_shared_experts": "shared experts", "train_non_expert_modules": "all modules that are no experts"}
    return [*(kind for name, kind in kinds.items() if getattr(config, name)), *(config.modules_to_save or [])]


def describe_storage(config: ESFTConfig) -> str:
    """What the tensors are, in words."""
    return STORAGE[config.storage] if config.rank is None else f"deltas of rank {config.rank}"


def describe_choice(config: ESFTConfig) -> str | None:
    """How the experts were chosen, in words; None if the config does not say."""
    selection = dict(config.selection or {})
    # Files have their keys sorted; what decides comes first here.
    names = [name for name in CHOICE if name in selection]
    names += [name for name in selection if name not in (*CHOICE, "task", "num_experts")]
    return ", ".join(f"{name} {selection[name]}" for name in names) or None


def _usage(config: ESFTConfig, name: str) -> str:
    lines = ["import peft_esft  # pip install peft-esft; registers the adapter type with PEFT"]
    if config.task_type == "CAUSAL_LM":
        lines += [
            "from peft import AutoPeftModelForCausalLM",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        ]
    else:
        lines += [
            "from peft import PeftModel",
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ]
    note = (
        "Without the import PEFT stops with `KeyError: 'ESFT'`. Engines that do not know this type of adapter read an "
        "ordinary checkpoint, which `peft-esft merge BASE ADAPTER OUT` writes."
    )
    return "\n".join(["```python", *lines, "```", "", note])


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _code(text: Any) -> str:
    return f"`{str(text).replace('`', '').replace('|', '')}`"


def num_experts_of(config: ESFTConfig) -> dict[str, int]:
    """How many experts there are to choose from, by container, as far as the config says."""
    for record in (config.base_fingerprint, config.selection):
        if record and isinstance(record.get("num_experts"), dict):
            return dict(record["num_experts"])
    return {}


def _picture(selection: dict[str, list[int]], num_experts: dict[str, int]) -> bytes:
    """A PNG with a row for each container and a column for each expert, the trained ones in blue."""
    width = max(max(num_experts.get(path, 0), *ids, 0) + (path not in num_experts) for path, ids in selection.items())
    lines: list[bytes] = []
    for path, ids in selection.items():
        total = num_experts.get(path, width)
        colours = [(TRAINED if e in set(ids) else FROZEN) if e < total else GAP for e in range(width)]
        line = b"".join(bytes(colour) * (CELL - 1) + bytes(GAP) for colour in colours)
        lines += [b"\0" + line] * (CELL - 1) + [b"\0" + bytes(GAP) * (CELL * width)]
    size = struct.pack(">IIBBBBB", CELL * width, len(lines), 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
