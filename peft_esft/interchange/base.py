"""The base that adapter files are made for: a model in memory, or a checkpoint that is never loaded whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ..moe.architectures import READABLE_DTYPES
from ..moe.containers import ExpertsContainer, find_experts, find_other_modules, find_shared_experts
from ..moe.weights import ExpertWeight, StackedWeight
from ..tuner.config import ESFTConfig
from ..tuner.fingerprint import EXPERTS, fingerprint
from .key_map import KeyMap, Source, mixed_weights
from .tensor_files import TensorFolder, block_shape


class Base:
    """A base model.

    Args:
        model: a transformers model without adapters, or the folder of one.

    Attributes:
        folder: its folder; None for a model in memory.
        model: the model; on the meta device if it was given as a folder.
        experts: its experts containers, by path.
        shared: its shared experts, as containers of kind "module".
        others: all its other modules, likewise.
        keys: which tensors of its checkpoint make up which parameter.

    Raises:
        ValueError: if the model carries adapters or has no experts.
        NotADirectoryError: if it is neither a model nor a folder.
        NotImplementedError: if its weights are quantised.
    """

    def __init__(self, model: nn.Module | str | Path) -> None:
        self.folder: Path | None = None
        self._files: TensorFolder | None = None
        if isinstance(model, nn.Module):
            if hasattr(model, "peft_config"):
                raise ValueError("the base carries adapters; pass the model without them (unload() removes them)")
            self.model: Any = model
        else:
            self.folder = Path(model)
            if not self.folder.is_dir():
                raise NotADirectoryError(
                    f"{model} is not the folder of a model. Download a Hub model first: hf download"
                )
            self.model = empty_model(self.folder)
            self._files = TensorFolder.of_model(self.folder)
        self.experts = find_experts(self.model)
        if not self.experts:
            raise ValueError(f"{type(self.model).__name__} has no experts container of a known kind")
        self.shared = find_shared_experts(self.model)
        self.others = find_other_modules(self.model)[0]
        entries = None if self._files is None else self._files.entries
        stored = None if entries is None else {key: entry.shape for key, entry in entries.items()}
        self.keys = KeyMap(self.model, stored)

    @property
    def name(self) -> str | None:
        """What an adapter's config calls it."""
        return str(self.folder) if self.folder is not None else getattr(self.model, "name_or_path", None) or None

    @property
    def files(self) -> TensorFolder:
        """The checkpoint's tensors; only for a base given as a folder."""
        assert self._files is not None
        return self._files

    @property
    def modules(self) -> dict[str, ExpertsContainer]:
        """Everything that an adapter can change: experts, shared experts and all other modules."""
        return self.experts | self.shared | self.others

    def trained_whole(self, config: ESFTConfig) -> dict[str, ExpertsContainer]:
        """The modules beside experts that a config asks for, each seen as one expert."""
        shared = self.shared if config.train_shared_experts else {}
        return shared | (self.others if config.train_non_expert_modules else {})

    def dtype(self, container: ExpertsContainer, weight: ExpertWeight) -> torch.dtype:
        """The dtype in which a weight is stored.

        Raises:
            NotImplementedError: if it is quantised.
        """
        if self.folder is None:
            dtype = weight.parameters(container.module)[0].dtype
        else:
            parameter = self._parameters(container, weight, [0])[0][0]
            dtype = self.files.entries[self.sources(container, parameter)[0].key].dtype
        if dtype not in READABLE_DTYPES:
            raise NotImplementedError(
                f"{container.path}.{weight.name} is stored as {dtype}, a quantised form. Save the base dequantised "
                "first, and use that checkpoint"
            )
        return dtype

    def rows(self, container: ExpertsContainer, weight: ExpertWeight, expert_ids: Sequence[int]) -> Tensor:
        """The rows of some experts, `[n, ...]`, read from the model or from the checkpoint.

        Raises:
            NotImplementedError: if they are quantised.
        """
        self.dtype(container, weight)
        if self.folder is None:
            return weight.read(container.module, expert_ids).detach()
        pieces = [
            self._read(self.sources(container, name), num_blocks, blocks)
            for name, num_blocks, blocks in self._parameters(container, weight, expert_ids)
        ]
        if isinstance(weight, StackedWeight):
            return pieces[0].reshape(len(expert_ids), *weight.shape(container.module))
        parts = len(weight.parts)
        return torch.stack([torch.cat(pieces[i : i + parts]) for i in range(0, len(pieces), parts)])

    def record(self, selection: Mapping[str, list[int]]) -> dict[str, Any]:
        """What a config keeps of the base, as `fingerprint.record_base` of a model."""
        rows = {}
        for path, ids in selection.items():
            container = self.experts[path]
            rows[path] = fingerprint([self.rows(container, weight, ids[:EXPERTS]) for weight in container.weights])
        return {"num_experts": {path: self.experts[path].num_experts for path in selection}, "rows": rows}

    def sources(self, container: ExpertsContainer, parameter: str) -> list[Source]:
        """The checkpoint's tensors that make up a parameter, or one that it is tied to.

        Raises:
            ValueError: if the checkpoint has none.
            NotImplementedError: if they hold another parameter too.
        """
        path = container.path
        for place in container.places:
            name = f"{place.path}{parameter.removeprefix(path)}"
            if name in self.keys.sources:
                return self.keys.sources[name]
        if parameter in self.keys.mixed:
            raise mixed_weights(parameter)
        raise ValueError(f"the checkpoint of the base has no tensor for {parameter}")

    def split(
        self, container: ExpertsContainer, weight: ExpertWeight, expert_ids: Sequence[int], rows: Tensor
    ) -> dict[str, Tensor]:
        """The rows of some experts as tensors of the checkpoint, by key, in the checkpoint's own layout.

        Raises:
            NotImplementedError: if the checkpoint keeps all experts in one tensor.
        """
        tensors: dict[str, Tensor] = {}
        for name, values in self._values(container, weight, expert_ids, rows):
            sources = self.sources(container, name)
            num_experts = container.num_experts
            if any(s.expert is None for s in sources) and (num_experts > 1 and isinstance(weight, StackedWeight)):
                raise NotImplementedError(
                    f"the checkpoint keeps all experts of {container.path} in one tensor ({sources[0].key}), so a "
                    "file of single experts has no keys for them"
                )
            keys = {(source.pattern, source.expert): source.key for source in sources}
            for (pattern, position), tensor in self.keys.split(sources[0].parameter, values).items():
                expert = None if position is None else expert_ids[position]
                tensors[keys[pattern, expert]] = tensor
        return tensors

    def overwrite(
        self,
        container: ExpertsContainer,
        weight: ExpertWeight,
        expert_ids: Sequence[int],
        rows: Tensor,
        folder: Path,
    ) -> None:
        """Writes the rows of some experts over those in a copy of the checkpoint, wherever a tied place is stored."""
        places = [place.path for place in container.places]
        for (name, num_blocks, blocks), (_, values) in zip(
            self._parameters(container, weight, expert_ids),
            self._values(container, weight, expert_ids, rows),
            strict=True,
        ):
            names = [f"{place}{name.removeprefix(container.path)}" for place in places]
            stored = [self.keys.sources[other] for other in names if other in self.keys.sources]
            if not stored:
                raise ValueError(f"the checkpoint of the base has no tensor for {name}")
            for sources in stored:
                self._write(sources, num_blocks, blocks, values, folder)

    def _parameters(
        self, container: ExpertsContainer, weight: ExpertWeight, expert_ids: Sequence[int]
    ) -> list[tuple[str, int, list[int]]]:
        """The parameters that hold some experts' rows: name, number of equal blocks in it, and which are meant."""
        if isinstance(weight, StackedWeight):
            name = f"{container.path}.{weight.parameter}"
            if weight.form == "single":
                return [(name, 1, [0])]
            rows = weight.parameters(container.module)[0].shape[0]
            return [(name, rows if weight.form == "stacked" else weight.num_experts, list(expert_ids))]
        return [
            (f"{container.path}.{weight.experts[expert]}.{part}", 1, [0])
            for expert in expert_ids
            for part in weight.parts
        ]

    def _values(
        self, container: ExpertsContainer, weight: ExpertWeight, expert_ids: Sequence[int], rows: Tensor
    ) -> list[tuple[str, Tensor]]:
        """Rows `[n, ...]` by the parameters that hold them: `[n, ...]` of it, or the whole of it."""
        names = [name for name, _, _ in self._parameters(container, weight, expert_ids)]
        if isinstance(weight, StackedWeight):
            return [(names[0], rows[0] if weight.form == "single" else rows)]
        values: list[Tensor] = []
        for row in rows:
            expert: Any = container.module._modules[weight.experts[0]]
            sizes = [expert.get_parameter(part).shape[0] for part in weight.parts]
            values += row.split(sizes)
        return list(zip(names, values, strict=True))

    def _read(self, sources: list[Source], num_blocks: int, blocks: list[int]) -> Tensor:
        if sources[0].pattern is None:
            rows = self.files.read_blocks(sources[0].key, num_blocks, blocks)
            return rows[0] if num_blocks == 1 else rows
        if sources[0].expert is not None:
            found = {(source.pattern, source.expert): source.key for source in sources}
            parts: dict[str | None, list[Tensor]] = {}
            for pattern in dict.fromkeys(source.pattern for source in sources):
                parts[pattern] = [self.files.read(found[pattern, expert]) for expert in blocks]
            return self.keys.join(sources[0].parameter, parts)
        if self._is_by_expert(sources, num_blocks):
            return self._joined(sources, num_blocks, blocks)
        whole = self._whole(sources)
        return whole if num_blocks == 1 else _blocks(whole, num_blocks)[blocks]

    def _whole(self, sources: list[Source]) -> Tensor:
        return self.keys.join(
            sources[0].parameter, {source.pattern: [self.files.read(source.key)] for source in sources}
        )

    def _joined(self, sources: list[Source], num_blocks: int, blocks: list[int]) -> Tensor:
        """Some experts of a parameter, of tensors that hold all of them along their first dimension."""
        return self.keys.join(
            sources[0].parameter,
            {source.pattern: [self.files.read_blocks(source.key, num_blocks, blocks)] for source in sources},
        )

    def _is_by_expert(self, sources: list[Source], num_blocks: int) -> bool:
        """Whether the tensors hold all experts, and some of these can be converted without the others."""
        apart = all(self.files.entries[source.key].shape[0] == num_blocks for source in sources)
        return num_blocks > 1 and apart and self.keys.converts_by_expert(sources[0].parameter)

    def _write(self, sources: list[Source], num_blocks: int, blocks: list[int], values: Tensor, folder: Path) -> None:
        values = values.to(self.files.entries[sources[0].key].dtype)
        if sources[0].pattern is None:
            key = sources[0].key
            rows = [values] if num_blocks == 1 else list(values)
            for block, row in zip(blocks, rows, strict=True):
                self.files.overwrite(key, folder, row, num_blocks, block)
            return
        keys = {(source.pattern, source.expert): source.key for source in sources}
        if sources[0].expert is None and self._is_by_expert(sources, num_blocks):
            for place, tensors in self.keys.split(sources[0].parameter, values).items():
                for block, tensor in zip(blocks, tensors, strict=True):
                    self.files.overwrite(keys[place], folder, tensor, num_blocks, block)
            return
        if sources[0].expert is None:
            whole = self._whole(sources)
            if num_blocks == 1:
                whole = values
            else:
                _blocks(whole, num_blocks)[blocks] = values.reshape(len(blocks), *block_shape(whole.shape, num_blocks))
            values = whole
        for (pattern, position), tensor in self.keys.split(sources[0].parameter, values).items():
            self.files.overwrite(keys[pattern, None if position is None else blocks[position]], folder, tensor)


def _blocks(value: Tensor, num_blocks: int) -> Tensor:
    """A view of a tensor as the equal blocks that it consists of."""
    return value if value.shape[0] == num_blocks else value.unflatten(0, (num_blocks, -1))


def empty_model(name: str | Path) -> Any:
    """The model of a folder or Hub name on the meta device: its modules without their weights.

    Raises:
        ValueError: if its config is malformed.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except StrictDataclassError as error:
        raise ValueError(f"the config of {name} is malformed: {error}") from error
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return architecture._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config)


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's task type, where the model's class says it."""
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
