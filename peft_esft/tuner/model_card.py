"""Writes the model card of a saved adapter: its base, its experts, how they were chosen, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .adapter_file import DELTA_KEY, Header, find_header, is_hub_name


CARD_NAME = "README.md"
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

Fields = Mapping[str, Any]
"""The fields of an `ESFTConfig`, as its file has them."""


def write_card(
    folder: Path, fields: Fields, experts: Mapping[str, list[int]], name: str = "name or folder of this adapter"
) -> None:
    """Writes or updates `README.md` beside an adapter's weights; nothing if there are none.

    A card that someone has filled in is kept: only the part between two comments is written anew. The form that PEFT
    leaves to be filled in is replaced.
    """
    header = find_header(folder, pickled=True)
    if header is None:
        return
    file, size = folder / CARD_NAME, sum(weights.stat().st_size for weights in {e.file for e in header.values()})
    card = ModelCard.load(file) if file.exists() else ModelCard("---\n{}\n---\n")
    _fill_metadata(card.data, fields)
    body = f"{BEGIN}\n{_body(fields, experts, header, size, name)}\n{END}"
    card.text = _with_body(card.text, body)
    card.save(file)


def _fill_metadata(data: Any, fields: Fields) -> None:
    data["library_name"] = "peft"
    tags, base = {*(data.get("tags") or []), *TAGS}, fields["base_model_name_or_path"]
    if is_hub_name(base):
        data["base_model"] = base
        data["base_model_relation"] = "adapter"
        tags = {tag for tag in tags if not tag.startswith(BASE_TAG)} | {f"{BASE_TAG}{base}"}
    data["tags"] = sorted(tags)
    if fields["task_type"] == "CAUSAL_LM" and not data.get("pipeline_tag"):
        data["pipeline_tag"] = "text-generation"


def _with_body(text: str, body: str) -> str:
    if BEGIN in text and END in text:
        return f"{text[: text.index(BEGIN)]}{body}{text[text.index(END) + len(END) :]}"
    versions = text[text.index("### Framework versions") :] if "### Framework versions" in text else ""
    if UNFILLED in text or not text.strip():
        return f"\n{body}\n\n{versions}\n" if versions else f"\n{body}\n"
    return f"{text.rstrip()}\n\n{body}\n"


def _body(fields: Fields, experts: Mapping[str, list[int]], header: Header, size: int, name: str) -> str:
    base = _code(fields["base_model_name_or_path"] or "an unnamed base")
    besides = trained_besides(fields)
    trained = " and ".join(["the experts below"] * bool(experts) + ["the modules named below"] * bool(besides))
    facts = {
        "base": base,
        "revision": _code(revision_of(fields)) if revision_of(fields) else None,
        "task type": fields["task_type"],
        "task": (fields["selection"] or {}).get("task"),
        "experts chosen by": describe_choice(fields),
        "trained experts": f"{sum(map(len, experts.values()))} in {len(experts)} layers" if experts else None,
        "trained besides": ", ".join(besides) or None,
        "stored as": describe_storage(fields),
        "file": f"{size / 1e6:.2f} MB, {sum(DELTA_KEY in key for key in header)} tensors",
    }
    total = num_experts_of(fields)
    rows = [
        (
            _code(path),
            f"{len(ids)}" + (f" of {total[path]}" if path in total else ""),
            ", ".join(map(str, sorted(ids))),
        )
        for path, ids in experts.items()
    ]
    parts = [
        f"# ESFT adapter for {base}",
        f"Expert-Specialized Fine-Tuning ([arXiv 2407.01906](https://arxiv.org/abs/2407.01906)): only {trained} "
        "were trained. All other weights are those of the base.",
        _table(("", ""), [(fact, str(value)) for fact, value in facts.items() if value is not None]),
        "## Use",
        _usage(fields["task_type"], name),
        *(["## Trained experts", _table(("layer", "experts", "ids"), rows)] if rows else []),
    ]
    return "\n\n".join(parts)


def revision_of(fields: Fields) -> str | None:
    """The revision of the base: the one that was asked for, or the commit that was loaded."""
    return fields["revision"] or (fields["base_fingerprint"] or {}).get("commit")


def trained_besides(fields: Fields) -> list[str]:
    """What is trained beside the experts, in words."""
    kinds = {"train_shared_experts": "shared experts", "train_non_expert_modules": "all modules that are not experts"}
    tokens = ["embeddings of some tokens"] * (fields["trainable_token_indices"] is not None)
    return [*(kind for name, kind in kinds.items() if fields[name]), *(fields["modules_to_save"] or []), *tokens]


def describe_storage(fields: Fields) -> str:
    """What the tensors are, in words."""
    return STORAGE[fields["storage"]] if fields["rank"] is None else f"deltas of rank {fields['rank']}"


def describe_choice(fields: Fields) -> str | None:
    """How the experts were chosen, in words; None if the config does not say."""
    selection = dict(fields["selection"] or {})
    # Files have their keys sorted; what decides comes first here.
    names = [name for name in CHOICE if name in selection]
    names += [name for name in selection if name not in (*CHOICE, "task", "num_experts")]
    return ", ".join(f"{name} {selection[name]}" for name in names) or None


def num_experts_of(fields: Fields) -> dict[str, int]:
    """How many experts there are to choose from, by experts module, as far as the config says."""
    for record in (fields["base_fingerprint"], fields["selection"]):
        if record and isinstance(record.get("num_experts"), dict):
            return dict(record["num_experts"])
    return {}


def _usage(task_type: str | None, name: str) -> str:
    lines = [
        "import peft_esft  # registers the adapter type with PEFT; install: pip install . in a clone of peft_esft"
    ]
    if task_type == "CAUSAL_LM":
        lines += [
            "from peft import AutoPeftModelForCausalLM",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        ]
    else:
        lines += ["from peft import PeftModel", f'model = PeftModel.from_pretrained(base, "{name}")']
    note = (
        "Without the import, PEFT stops with `KeyError: 'ESFT'`. Start programs of others (`lm_eval`, `trl`) "
        "with `peft-esft run -- PROGRAM ARGS`, which adds the import. Other engines read an ordinary checkpoint, "
        "which `peft-esft merge BASE ADAPTER OUT` writes."
    )
    return "\n".join(["```python", *lines, "```", "", note])


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _code(text: Any) -> str:
    return f"`{str(text).replace('`', '').replace('|', '')}`"
