"""What a config means in a model, found and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..moe.containers import ExpertsContainer, find_experts
from ..moe.weights import is_spread
from .adapter_file import DELTA_KEY, KEY_PREFIX, check_finite, check_finite_header, check_header, check_rank
from .config import ESFTConfig
from .fingerprint import check_num_experts, compare_base
from .layers.expert_parallel import ExpertParallelExperts, check_expert_parallel, shares_out_experts
from .layers.layer import PREFIX, ESFTLayer
from .messages import shortened
from .mixed_batch import BASE
from .targets import full_modules, not_excluded, resolve_target_experts
from .trainable import check_trainable, warn_of_slow_layouts


_CONTAINERS_BY_NAME = (nn.ParameterDict, BufferDict)
"""What keeps adapters' tensors by name; its own attributes cannot be names."""


@dataclass(frozen=True)
class ResolvedConfig:
    """What a config selects in a model.

    Attributes:
        target_experts: the config's, by module path.
        selection: the same, and modules that are trained whole, each as its only expert.
        containers: those of the selection that no option of the config excludes.
        experts: all experts containers of the model.
    """

    target_experts: dict[str, list[int]]
    selection: dict[str, list[int]]
    containers: dict[str, ExpertsContainer]
    experts: dict[str, ExpertsContainer]

    @property
    def nbytes(self) -> int:
        """Bytes of the selected rows in the base's dtypes."""
        return sum(len(self.selection[path]) * c.nbytes_per_expert for path, c in self.containers.items())


def prepare_config(peft_config: ESFTConfig, model: nn.Module) -> ResolvedConfig:
    """Resolves a config against a model and checks whether it can be trained or loaded there.

    Args:
        peft_config: of the adapter that is to be added.
        model: the base, with or without adapters.

    Raises:
        ValueError: if the config selects nothing, or something that this model does not have, or weights that go with
            it do not fit.
        NotImplementedError: if weights that are to be trained cannot be read.
    """
    if peft_config.storage != "delta" and not peft_config.inference_mode:
        raise ValueError(
            f"an adapter stored as {peft_config.storage!r} is for inference only and cannot be trained; train the "
            "one that it was made from"
        )
    resolved = resolve_config(peft_config, model)
    for container in resolved.containers.values():
        if shares_out_experts(container):
            check_expert_parallel(container)
        else:
            check_trainable(container)
    check_rank(peft_config.rank, resolved.containers.values())
    header = peft_config.pop_header()
    if header is not None:
        selection = {path: resolved.selection[path] for path in resolved.containers}
        check_header(header, peft_config.rank, peft_config.storage, selection, resolved.containers)
        check_finite_header(header)
    compare_base(peft_config, model, resolved.experts, resolved.target_experts)
    warn_of_slow_layouts(resolved.containers.values())
    return resolved


def resolve_config(peft_config: ESFTConfig, model: nn.Module) -> ResolvedConfig:
    """Finds what a config selects in a model.

    Raises:
        ValueError: if the config selects nothing, or something that this model does not have.
    """
    experts = find_experts(model)
    if not experts:
        raise ValueError(
            f"{type(model).__name__} has no experts container of a known kind. ESFT needs a "
            "mixture-of-experts model whose experts are fused parameters or a list of modules beside a router."
        )
    whole = full_modules(model, peft_config.train_shared_experts, peft_config.train_non_expert_modules)
    if not peft_config.target_experts and not whole:
        raise ValueError(
            "target_experts is empty, so nothing would be trained. Choose experts with "
            "ESFTConfig.from_scores(score_experts(model, batches)), or name them: {layer index: expert ids}"
        )
    target_experts = resolve_target_experts(peft_config.target_experts or {}, experts)
    check_num_experts((peft_config.selection, peft_config.base_fingerprint), target_experts, experts)
    selection = {**target_experts, **{path: [0] for path in whole}}
    containers = {path: (experts | whole)[path] for path in not_excluded(peft_config.module_options, selection)}
    return ResolvedConfig(target_experts, selection, containers, experts)


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Refuses names under which torch cannot keep parameters, or PEFT cannot save them.

    Args:
        adapter_name: the name.
        model: the base model.

    Raises:
        ValueError: with a name that works.
    """
    is_name = isinstance(adapter_name, str) and adapter_name and not {".", "\n"} & set(adapter_name)
    if not is_name or adapter_name == BASE or any(hasattr(kind(), adapter_name) for kind in _CONTAINERS_BY_NAME):
        raise ValueError(
            f"{adapter_name!r} cannot be an adapter's name: a name is a text without dots and line breaks, not "
            f"{BASE!r}, and not one that torch uses itself, such as 'train' or 'keys'. 'law-v1_0' is one"
        )
    if adapter_name.startswith(PREFIX) or adapter_name in _reserved_names(model):
        raise ValueError(
            f"{adapter_name!r} cannot be an adapter's name: a module or weight of the model is called the same, and "
            f"PEFT could not tell their weights apart when it saves. '{adapter_name}_adapter' works"
        )


def _reserved_names(model: nn.Module) -> set[str]:
    """The parts of names of weights: PEFT leaves out of a file what has another adapter's name among them."""
    names = {name.partition(f".{PREFIX}")[0].partition(".modules_to_save.")[0] for name, _ in model.named_parameters()}
    parts = {"base_model", "model", "modules_to_save", *(part for name in names for part in name.split("."))}
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))  # another method's too
    return parts.difference(*(layer._all_available_adapter_names() for layer in layers))


def check_incoming(model: nn.Module, config: ESFTConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not those of an adapter in the model, before the first of them is copied.

    PEFT reads no config where it loads weights for a name that exists.

    Args:
        model: with adapters.
        config: of the adapter that the weights are for.
        adapter_name: its name.
        state_dict: the weights, by their names in a file.

    Raises:
        ValueError: naming the first few misfits, or the first tensor that is not finite.
    """
    every_layer = [module for module in model.modules() if isinstance(module, ESFTLayer)]
    layers = {layer.path: layer for layer in every_layer if adapter_name in layer.expert_ids}
    found = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in state_dict.items() if DELTA_KEY in key}
    advice = "Load it under a name of its own, or put it in this one's place with hotswap_adapter"
    if layers and not found:
        raise ValueError(f"there are no weights of an ESFT adapter for {adapter_name!r}: they are another method's")
    if strangers := sorted({key.partition(DELTA_KEY)[0] for key in found} - layers.keys()):
        raise ValueError(
            f"adapter {adapter_name!r} has no weights in {strangers[:4]}, for which there are some: they are another "
            f"adapter's. {advice}"
        )
    if problems := _misfits(layers.values(), adapter_name, found):
        raise ValueError(f"the weights do not fit adapter {adapter_name!r}: {shortened(problems)}. {advice}")
    check_finite(found)


def _misfits(layers: Iterable[ESFTLayer], adapter_name: str, found: Mapping[str, Tensor]) -> list[str]:
    """What of some weights is not as the adapter's own tensors are."""
    own, whole = {}, {}
    for layer in layers:
        tensors = {f"{layer.path}.{name}": tensor for name, tensor in layer.tensors_of(adapter_name).items()}
        own.update(tensors)
        if not isinstance(layer, ExpertParallelExperts):
            # Where processes share out the weights, those at hand have another shape than the file's.
            whole.update({key: tensor for key, tensor in tensors.items() if not is_spread(tensor)})
    return [f"{key} is none of its tensors" for key in found if key not in own] + [
        f"{key} is {list(tensor.shape)}, expected is {list(whole[key].shape)}"
        for key, tensor in found.items()
        if key in whole and tensor.shape != whole[key].shape
    ]
