"""Defines `peft-esft verify`, which checks that an adapter does what its file says and leaves the base as it is."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

from .base_options import add_base_options


TOLERANCES = {"float32": 1e-4, "float64": 1e-8}
"""Largest relative difference of merged and unmerged outputs, by dtype; products of other dtypes round more."""
OTHER_TOLERANCE = 0.05


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "verify",
        help="check that an adapter is exact: for CI",
        description="Loads an adapter and checks that every tensor of its file is in the model, that the base's "
        "weights keep every bit while it is used, merged and unmerged, that merged equals unmerged, and that no "
        "expert has another precision than the model. Exits with 1 if a check fails.",
    )
    parser.set_defaults(run=run, kinds={"model": ("model",), "adapter": ("adapter",)})
    parser.add_argument("model", help="folder or Hub name of the base model")
    parser.add_argument("adapter", help="folder of the adapter")
    add_base_options(parser)


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Runs all checks; the record's `ok` is False if one fails."""
    from peft import PeftModel

    from .loading import load_base

    base = load_base(options)
    dtypes = _other_dtypes(base)
    before = _hashes(base)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    checks = {
        f"all experts are in {str(base.dtype).removeprefix('torch.')}, as the model is": dtypes,
        "every tensor of the file is in the model, bit for bit": _lost_tensors(model, options.adapter),
        **_check_use(model, before),
    }
    lines = [f"{'FAILED' if found else 'ok    '}  {check}{found and f': {found}'}" for check, found in checks.items()]
    ok = not any(checks.values())
    return {"ok": ok, "checks": {check: found or "ok" for check, found in checks.items()}}, "\n".join(lines)


def _check_use(model: Any, before: dict[str, str]) -> dict[str, str]:
    """Uses, merges and unmerges the adapter. Returns what is wrong with each, or ""."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_base_model().get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (2, 32), generator=generator).to(model.device)

    @torch.no_grad()
    def outputs() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits

    with model.disable_adapter():
        of_base = outputs()
    unmerged, used = outputs(), _changed(before, _hashes(model))
    model.merge_adapter()
    merged = outputs()
    model.unmerge_adapter()
    difference = float((merged - unmerged).float().norm() / unmerged.float().norm())
    tolerance = TOLERANCES.get(str(model.dtype).removeprefix("torch."), OTHER_TOLERANCE)
    return {
        "the base keeps every bit while the adapter is used": used,
        "the adapter changes the outputs": "they are the base's" if torch.equal(of_base, unmerged) else "",
        f"merged outputs are the unmerged ones within {tolerance:g}": f"they differ by {difference:.2g}"
        if not difference <= tolerance
        else "",
        "the base has every bit back after unmerging": _changed(before, _hashes(model)),
        "the adapter's outputs are the same after unmerging": ""
        if torch.equal(outputs(), unmerged)
        else "they are not",
    }


def _other_dtypes(base: Any) -> str:
    """The experts modules whose weights have another dtype than the model."""
    from ..moe.containers import find_experts

    others = {
        f"{path} is in {tensor.dtype}"
        for path, container in find_experts(base).items()
        for weight in container.weights
        for tensor in _tensors_of(weight, container.module)
        if tensor.dtype != base.dtype
    }
    return _some(sorted(others))


def _tensors_of(weight: Any, module: Any) -> list[Any]:
    """A weight's parameters, or the one that stands for them in few bits, whose dtype is that of computing."""
    from ..moe.weights import StoredWeight

    return [weight.whole(module)] if isinstance(weight, StoredWeight) else list(weight.parameters(module))


def _lost_tensors(model: Any, adapter: str) -> str:
    """Tensors of an adapter's file that the model does not have, or has with other values."""
    import torch
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    saved = load_peft_weights(adapter, device="cpu")
    own = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    different = [name for name, tensor in saved.items() if name not in own or not torch.equal(own[name], tensor)]
    return _some([*different, *sorted(own.keys() - saved.keys())])


def _hashes(model: Any) -> dict[str, str]:
    """A hash of each of the base's parameters and buffers, by the name that it has without adapters."""
    import torch

    hashes = {}
    module = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        parts = name.split(".")
        if any(part.startswith("esft_") or part == "modules_to_save" or part.endswith("_tables") for part in parts):
            continue
        plain = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashes[plain] = hashlib.sha256(content.tobytes()).hexdigest()
    return hashes


def _changed(before: dict[str, str], after: dict[str, str]) -> str:
    return _some([name for name in before if after.get(name) != before[name]])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
