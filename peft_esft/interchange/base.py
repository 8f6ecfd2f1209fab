"""Reads and writes the rows of a base model: one in memory, or a checkpoint that is never loaded whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ..moe.architectures import READABLE_DTYPES
from ..moe.containers import ExpertsContainer, find_experts, find_other_modules, find_shared_experts, no_experts
from ..moe.weights import ExpertWeight, ListedWeight, StackedWeight
from ..tuner.adapter_file import DELTA_KEY, KEY_PREFIX
from ..tuner.config import ESFTConfig
from ..tuner.fingerprint import EXPERTS, check_num_experts, fingerprint, fingerprint_container
from ..tuner.targets import not_excluded, resolve_target_experts
from .key_map import KeyMap, Source, mixed_weights
from .repositories import is_quantised, local_folder
from .tensor_files import TensorFolder


@dataclass(frozen=True)
class Rows:
    """Names some rows of a model: those of `expert_ids`, in their order, in one weight of an experts module."""

    container: ExpertsContainer
    weight: ExpertWeight
    expert_ids: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows, `[n, ...]`."""
        return (len(self.expert_ids), *self.weight.shape(self.container.module))

    @property
    def key(self) -> str:
        """The key of the weight in an adapter file, without a suffix."""
        return f"{KEY_PREFIX}{self.container.path}{DELTA_KEY}{self.weight.name}"

    def join(self, values: list[Tensor]) -> Tensor:
        """The rows `[n, ...]` from the values of the parameters that hold them, in the order of `Base.parts`."""
        if isinstance(self.weight, StackedWeight):
            return values[0].reshape(self.shape)
        step = len(self.weight.parts)
        return torch.stack([torch.cat(values[i : i + step]) for i in range(0, len(values), step)])

    def split(self, values: Tensor) -> list[Tensor]:
        """The inverse of `join`."""
        if isinstance(self.weight, StackedWeight) and self.weight.form != "single":
            return [values]
        return list(self.weight.substitutes(self.container.module, self.expert_ids, values).values())


@dataclass(frozen=True)
class Part:
    """A parameter that holds rows, as a checkpoint stores it.

    Attributes:
        sources: its tensors in the checkpoint. If experts are apart, only those of the rows, in the order of the rows.
        num_blocks: how many equal blocks the parameter has: one for each expert, or 1 if it is not divided.
        blocks: the blocks that hold the rows.
    """

    sources: list[Source]
    num_blocks: int
    blocks: list[int]

    @property
    def holds_other_experts(self) -> bool:
        """True if each tensor holds all experts."""
        return self.num_blocks > 1 and self.sources[0].expert is None


class Base:
    """A base model in memory or on disk, whose rows are read and written.

    Args:
        model: a transformers model without adapters, or the folder or the Hub name of one.
        revision: of a model on the Hub.
        variant: of the weights of a folder or a model on the Hub.
        head: a class with another head than the folder's own.

    Attributes:
        model: the model. It is on the meta device if it was given as a folder.
        folder: its folder. None for a model in memory.
        head: as given.
        files: the checkpoint's tensors. Empty for a model in memory.
        experts: its experts modules, by path.
        shared: its shared experts, as containers of kind "module".
        others: all its other modules, as containers of kind "module".
        modules: all modules that an adapter can change: the three above.
        keys: which tensors of its checkpoint make up which parameter.

    Raises:
        ValueError: if the model carries adapters or has no experts.
        OSError: if it is neither a model nor a folder, nor a name that is in the Hub's cache or can be downloaded.
        NotImplementedError: if its weights are quantised.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        head: Head | None = None,
    ) -> None:
        if hasattr(model, "peft_config"):
            raise ValueError("the base has adapters; pass the model without them (unload() removes them)")
        self.model: Any = model
        self.folder: Path | None = None
        self.head = head
        self.files = TensorFolder([])
        if not isinstance(model, nn.Module):
            self._given_name = str(model)
            self.folder, self.files = checkpoint_of(model, revision, variant)
            if is_quantised(self.folder):
                raise NotImplementedError(
                    f"the experts of {model} are quantised. Use the checkpoint that it was made from: adapters "
                    "that were trained over the quantised one fit it too. In memory, merge_and_unload() keeps the "
                    "merged experts in full precision, and save_pretrained writes them so"
                )
            self.model = empty_model(self.folder, head)
        self.experts = find_experts(self.model)
        if not self.experts:
            raise ValueError(no_experts(self.model))
        self.shared = find_shared_experts(self.model)
        self.others = find_other_modules(self.model)[0]
        self.modules = self.experts | self.shared | self.others
        stored = {key: entry.shape for key, entry in self.files.entries.items()}
        self.keys = KeyMap(self.model, None if self.folder is None else stored)

    @property
    def name(self) -> str | None:
        """The base's name in an adapter's config."""
        return self._given_name if self.folder is not None else getattr(self.model, "name_or_path", None) or None

    def adapted_experts(self, config: ESFTConfig) -> dict[str, list[int]]:
        """The experts that a config adapts, by path. A module that is trained whole has the one expert 0.

        Raises:
            ValueError: if the config does not fit this base.
        """
        selection = resolve_target_experts(config.target_experts or {}, self.experts)
        check_num_experts((config.selection, config.base_fingerprint), selection, self.experts)
        shared = self.shared if config.train_shared_experts else {}
        others = self.others if config.train_non_expert_modules else {}
        selection |= {path: [0] for path in [*shared, *others]}
        return {path: selection[path] for path in not_excluded(config.module_options, selection)}

    def record(self, selection: Mapping[str, list[int]]) -> dict[str, Any]:
        """What a config keeps of the base; the same as `fingerprint.record_base` of a model."""
        rows: dict[str, str] = {}
        for path, ids in selection.items():
            container = self.experts[path]
            if self.folder is None:
                value = fingerprint_container(container, ids)
                rows |= {} if value is None else {path: value}
                continue
            rows[path] = fingerprint([self.rows(container, weight, ids[:EXPERTS]) for weight in container.weights])
        return {"num_experts": {path: self.experts[path].num_experts for path in selection}, "rows": rows}

    def rows(self, container: ExpertsContainer, weight: ExpertWeight, expert_ids: Sequence[int]) -> Tensor:
        """Reads the rows of some experts, see `read`."""
        return self.read(Rows(container, weight, list(expert_ids)))

    def dtype(self, rows: Rows) -> torch.dtype:
        """The dtype in which rows are stored. Refuses quantised rows."""
        if self.folder is None:
            dtype = rows.weight.dtype(rows.container.module)
        else:
            dtype = self.files.entries[self.parts(rows)[0][0].sources[0].key].dtype
        if dtype not in READABLE_DTYPES:
            raise NotImplementedError(
                f"{rows.container.path}.{rows.weight.name} is stored as {dtype}, a quantised form. Save the base "
                "dequantised first, and use that checkpoint"
            )
        return dtype

    def read(self, rows: Rows, read_tensor: Callable[[str], Tensor] | None = None) -> Tensor:
        """Reads rows, `[n, ...]`, from the base, or with a function that gives other values for the base's keys."""
        self.dtype(rows)
        if read_tensor is None and self.folder is None:
            return rows.weight.read(rows.container.module, rows.expert_ids).detach()
        return rows.join([self._read(copies[0], read_tensor or self.files.read) for copies in self.parts(rows)])

    def split(self, rows: Rows, values: Tensor) -> dict[str, Tensor]:
        """The values `[n, ...]` of rows as tensors of the checkpoint, by key, in the checkpoint's own layout.

        Raises:
            NotImplementedError: if the checkpoint keeps all experts in one tensor.
        """
        tensors: dict[str, Tensor] = {}
        for (part, *_), value in zip(self.parts(rows), rows.split(values), strict=True):
            if part.holds_other_experts:
                raise NotImplementedError(
                    f"the checkpoint keeps all experts of {rows.container.path} in one tensor "
                    f"({part.sources[0].key}). The original code's files can only be made for checkpoints that "
                    "keep each expert apart"
                )
            tensors |= self._tensors(part, value)
        return tensors

    def overwrite(self, rows: Rows, values: Tensor, folder: Path) -> None:
        """Writes the values `[n, ...]` of rows into a copy of the checkpoint, at every tied place that it stores."""
        for copies, value in zip(self.parts(rows), rows.split(values), strict=True):
            for part in copies:
                self._write(part, value.to(self.files.entries[part.sources[0].key].dtype), folder)

    def parts(self, rows: Rows) -> list[list[Part]]:
        """The parameters that hold rows. A tied parameter may be stored several times, an untied one is stored once.

        Raises:
            ValueError: if the checkpoint has no tensor for a parameter.
            NotImplementedError: if it stores a parameter in the same tensors as another one.
        """
        weight, num_blocks, blocks = rows.weight, 1, [0]
        if isinstance(weight, ListedWeight):
            names = [f"{weight.experts[expert]}.{part}" for expert in rows.expert_ids for part in weight.parts]
        else:
            names = [weight.parameter]
            if weight.form != "single":
                stacked = weight.parameters(rows.container.module)[0].shape[0]
                num_blocks = stacked if weight.form == "stacked" else weight.num_experts
                blocks = rows.expert_ids
        parts = []
        for name in names:
            copies = []
            for place in rows.container.places:
                sources = self.keys.sources.get(f"{place.path}.{name}", [])
                if sources and sources[0].expert is not None:
                    sources = [source for block in blocks for source in sources if source.expert == block]
                if sources:
                    copies.append(Part(sources, num_blocks, blocks))
            if not copies:
                parameter = f"{rows.container.path}.{name}"
                if parameter in self.keys.mixed:
                    raise mixed_weights(parameter)
                raise ValueError(f"the checkpoint of the base has no tensor for {parameter}")
            parts.append(copies)
        return parts

    def _read(self, part: Part, read_tensor: Callable[[str], Tensor]) -> Tensor:
        """The blocks of a parameter that hold rows, or the whole parameter if it is not divided."""
        by_block = self._converts_by_block(part)
        tensors: dict[str | None, list[Tensor]] = {}
        for source in part.sources:
            tensor = read_tensor(source.key)
            if by_block:
                tensor = _by_block(tensor, part.num_blocks)[part.blocks]
            tensors.setdefault(source.pattern, []).append(tensor)
        value = self.keys.join(part.sources[0].parameter, tensors)
        if part.holds_other_experts and not by_block:
            return _by_block(value, part.num_blocks)[part.blocks]
        return value

    def _write(self, part: Part, values: Tensor, folder: Path) -> None:
        """The inverse of `_read`."""
        by_block = self._converts_by_block(part)
        if part.holds_other_experts and not by_block:
            whole = self._read(Part(part.sources, 1, [0]), self.files.read)
            blocks = _by_block(whole, part.num_blocks)
            blocks[part.blocks] = values.reshape(len(part.blocks), *blocks.shape[1:])
            values = whole
        for key, tensor in self._tensors(part, values).items():
            if by_block:
                for block, row in zip(part.blocks, tensor, strict=True):
                    self.files.overwrite(key, folder, row, part.num_blocks, block)
            else:
                self.files.overwrite(key, folder, tensor)

    def _tensors(self, part: Part, values: Tensor) -> dict[str, Tensor]:
        """The checkpoint's tensors for the values of a parameter, by key."""
        keys = {(source.pattern, source.expert): source.key for source in part.sources}
        return {
            keys[pattern, None if position is None else part.blocks[position]]: tensor
            for (pattern, position), tensor in self.keys.split(part.sources[0].parameter, values).items()
        }

    def _converts_by_block(self, part: Part) -> bool:
        """True if tensors hold all experts, and some experts can be read or written without the others."""
        if not part.holds_other_experts:
            return False
        if part.sources[0].pattern is None:
            return True
        shapes = [self.files.entries[source.key].shape for source in part.sources]
        is_stacked = all(shape[0] == part.num_blocks for shape in shapes)
        return is_stacked and self.keys.converts_by_expert(part.sources[0].parameter)


def _by_block(value: Tensor, num_blocks: int) -> Tensor:
    """A view of a tensor as the equal blocks that it consists of."""
    return value if value.shape[0] == num_blocks else value.unflatten(0, (num_blocks, -1))


def checkpoint_of(
    name: str | Path, revision: str | None = None, variant: str | None = None
) -> tuple[Path, TensorFolder]:
    """The folder and the tensors of a model in a folder or on the Hub.

    Raises:
        OSError: if it is neither, or has no weights.
        ValueError: if its files are malformed.
    """
    folder = local_folder(name, revision, variant=variant)
    try:
        return folder, TensorFolder.of_model(folder, variant)
    except FileNotFoundError:
        if Path(name).is_dir():
            raise
    folder = local_folder(name, revision, variant=variant, pickled=True)
    return folder, TensorFolder.of_model(folder, variant)


@dataclass(frozen=True)
class Head:
    """The head of a class that a checkpoint is loaded with.

    Attributes:
        task_type: PEFT's, one of `HEADS`.
        num_labels: the number of its outputs.
    """

    task_type: str
    num_labels: int


HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""The classes of transformers for the task types of PEFT whose head is trained with the adapter."""


def empty_model(name: str | Path, head: Head | None = None) -> Any:
    """Builds the model of a folder or Hub name on the meta device, without weights.

    Args:
        name: of the model.
        head: another head than that of the class that the config names.

    Raises:
        ValueError: if its config is malformed, or it has no class with such a head.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except StrictDataclassError as error:
        raise ValueError(f"the config of {name} is malformed: {error}") from error
    if head is not None:
        config.num_labels = head.num_labels
        with torch.device("meta"):
            model = getattr(transformers, HEADS[head.task_type]).from_config(config)
        model.config.architectures = [type(model).__name__]
        return model
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return architecture._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config)


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's task type for a model, if the name of its class says it."""
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
