"""Defines `ESFTConfig`: which experts of which layers are trained, and how that choice was made."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType

from ..scoring.memory_estimate import Setup
from ..scoring.scores import ExpertScores, Metric
from ..scoring.selection import DEFAULT_TOP_P, select_experts, top_p_for_memory
from .adapter_file import KEY_PREFIX, Header, find_header, find_hub_header, finish_file, read_header
from .config_checks import check_target_experts, check_types, check_values
from .file_checks import check_experts, check_foreign, foreign_keys
from .model_card import write_card
from .other_classes import Prefixes, moved
from .targets import ModuleOptions, adapted_selection


@dataclass
class ESFTConfig(PeftConfig):
    """Configuration of Expert-Specialized Fine-Tuning (arXiv 2407.01906).

    Args:
        target_experts: The experts to train. A key is the path of an experts module
            (`"model.layers.3.mlp.experts"`, as `find_experts` lists it) or the index of a decoder layer (`3` or
            `"3"`). A value is a list of expert ids. Indices become paths when the adapter is attached.
        train_shared_experts: Also train the shared experts of all layers. Every token passes through these.
        train_non_expert_modules: Also train everything that is neither an expert nor a shared expert, routers
            included, as the paper's released code does.
        rank: The rank of the deltas; None means full rank. With a rank, only matrices change, and vectors such as
            biases do not.
        alpha: Scales deltas of low rank by `alpha / rank`; None means `alpha = rank`.
        use_rslora: Scale by `alpha / sqrt(rank)` instead (arXiv 2312.03732).
        modules_to_save: Other modules to train and save whole, for example a classification head.
        trainable_token_indices: Tokens whose embeddings are trained and saved, as in `LoraConfig`: ids, or ids by the
            name of the embedding.
        ensure_weight_tying: Keep tied embeddings tied if one of them is trained, as in `LoraConfig`.
        exclude_modules: Experts modules to leave out: a list of names or endings of paths, or a regular expression.
        layers_to_transform: Adapt only these layers of those in `target_experts`.
        layers_pattern: The name of the list of layers that `layers_to_transform` counts in. None means that the first
            number in a path is the index of the layer.
        init_weights: True starts from zero deltas, so the model is unchanged before training. False starts from small
            random deltas, for tests.
        selection: How the experts were chosen: metric, top_p, averaging, number of tokens. It is a record only, except
            for `num_experts`: loading fails on a model with another number of experts.
        storage: How the file stores the weights. "delta" can be trained. "rows", "int8", "int4" and "int1" are the
            smaller forms of `interchange.compact`, for inference only.
        base_fingerprint: Hashes of some of the base's rows, to notice another base. Attaching a new adapter sets them.
            None compares nothing.
    """

    target_experts: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "The experts to train: {path of the experts module, or index of the decoder layer: expert ids}."
        },
    )
    train_shared_experts: bool = field(
        default=False, metadata={"help": "Also train the experts that every token passes through."}
    )
    train_non_expert_modules: bool = field(
        default=False, metadata={"help": "Also train everything that is not an expert, routers included."}
    )
    rank: int | None = field(default=None, metadata={"help": "Rank of the deltas; None means full rank."})
    alpha: float | None = field(
        default=None, metadata={"help": "Deltas of low rank are scaled by alpha / rank; None means alpha = rank."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank) instead."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained: ids, or ids by the embedding's name."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Keep tied embeddings tied where one of them is trained."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Experts modules to leave out: names, endings of paths, or a regular expression."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only these layers of those in target_experts."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list whose index layers_to_transform counts."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: zero deltas, the model starts unchanged. False: small random deltas."}
    )
    selection: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the experts were chosen: metric, top_p, averaging, number of tokens."}
    )
    storage: str = field(
        default="delta", metadata={"help": "How the file stores the weights; all but 'delta' are for inference only."}
    )

    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the base's rows looked like when the adapter was made."}
    )

    # PEFT reads this attribute of every config. Ours is not a field: `target_experts` alone says what is adapted.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ESFT
        # What is adapted in the model at hand, by module path, once the adapter is attached. Not a field of the file.
        self.adapted_paths: dict[str, list[int]] = {}
        # How the paths were changed since it was read, see `move`.
        self.prefixes: Prefixes = {}
        # Whether `base_fingerprint` was recorded when this config was attached, and not read from a file.
        self.has_own_fingerprint = False
        self._find_header: Callable[[], Header | None] | None = None
        for name in ("modules_to_save", "exclude_modules"):
            if isinstance(getattr(self, name), set | tuple):
                setattr(self, name, sorted(getattr(self, name)))
        if isinstance(self.alpha, int) and not isinstance(self.alpha, bool):
            self.alpha = float(self.alpha)
        check_types(self)
        check_values(self)
        if self.target_experts is not None:
            self.target_experts = check_target_experts(self.target_experts)

    def pop_header(self) -> Header | None:
        """The header of the weights that belong to this config, which is checked before the model is changed.

        It is returned once, for the adapter that is attached with this config. For a config from the Hub, the header
        is downloaded now, because reading a config downloads no weights.
        """
        find, self._find_header = self._find_header, None
        return None if find is None else find()

    @property
    def scaling(self) -> float:
        """The number that multiplies the product of a low-rank delta's factors; 1 for full-rank deltas."""
        if self.rank is None:
            return 1.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.use_rslora else alpha / self.rank

    @property
    def module_options(self) -> ModuleOptions:
        """The options that say which of the selected modules are adapted."""
        return ModuleOptions(self.exclude_modules, self.modules_to_save, self.layers_to_transform, self.layers_pattern)

    @property
    def adapted_experts(self) -> dict[str, list[int]]:
        """The experts that the adapter changes: `target_experts` without those that other options exclude."""
        return adapted_selection(self.module_options, self.target_experts or {})

    def move(self, prefixes: Prefixes) -> None:
        """Changes the paths of modules to those of another class of the checkpoint, see `other_classes`."""
        self.prefixes = prefixes
        if not prefixes:
            return

        def by_path(values: dict[str, Any] | None) -> dict[str, Any] | None:
            return values and {moved(path, prefixes): value for path, value in values.items()}

        self.target_experts = by_path(self.target_experts)
        for name in ("selection", "base_fingerprint"):
            record = getattr(self, name)
            tables = {key: by_path(record[key]) for key in ("num_experts", "rows") if key in (record or {})}
            setattr(self, name, record and record | tables)
        # PEFT compares these with the endings of paths. A path without what it began with is an ending already.
        starts = {before: now for before, now in prefixes.items() if before}
        for name in ("modules_to_save", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, [moved(path, starts) for path in value])
        if isinstance(tokens := self.trainable_token_indices, dict):
            self.trainable_token_indices = {moved(path, starts): own for path, own in tokens.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the config, and a model card if the adapter's weights are in the same folder.

        Args:
            save_directory: the folder.
            **kwargs: see `peft.PeftConfig.save_pretrained`.
        """
        folder, config = Path(save_directory), self
        if "auto_mapping_dict" in kwargs:  # PeftModel.save_pretrained, which has just written the weights
            config = self._described(folder)
        PeftConfig.save_pretrained(config, save_directory, **kwargs)
        write_card(folder, config.to_dict(), config.adapted_experts)

    def check_file(self, header: Header) -> None:
        """Refuses weights that do not belong to this config, as far as this is known without a model.

        Args:
            header: of the file.

        Raises:
            ValueError: if it has tensors that the config does not allow, or its note names other experts.
        """
        check_foreign(self._foreign(header))
        if any(path.isdigit() for path in self.adapted_experts):
            return  # a config made by hand: a layer's number is not a path
        for file in {entry.file for entry in header.values()}:
            check_experts(file, self.adapted_experts)

    def _foreign(self, header: Header) -> list[str]:
        has_tokens = self.trainable_token_indices is not None
        return foreign_keys(header, self.modules_to_save or (), has_tokens=has_tokens)

    def _described(self, folder: Path) -> ESFTConfig:
        """The config with all modules that are in the weights' file: PEFT also saves resized embeddings on its own.

        They are added to `modules_to_save`.
        """
        header = find_header(folder, pickled=True) or {}
        if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            finish_file(folder / SAFETENSORS_WEIGHTS_NAME, self.adapted_experts)
            header = read_header(folder / SAFETENSORS_WEIGHTS_NAME)
        foreign = self._foreign(header)
        if lora := [key for key in foreign if ".lora_" in key]:
            warnings.warn(
                f"the model has LoRA weights beside ESFT's, for example {lora[0]}. They are now in the adapter's "
                "file, and PEFT will not load that file, because it saves and loads one method at a time. Save "
                "the LoRA weights from a model that has no ESFT adapter",
                stacklevel=3,
            )
        added = dict.fromkeys(key.removeprefix(KEY_PREFIX).rpartition(".")[0] for key in foreign if key not in lora)
        if not added:
            return self
        config = copy.copy(self)
        config.modules_to_save = [*(self.modules_to_save or []), *added]
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ESFTConfig:
        """Reads a config. From a folder, it also reads the header of the weights.

        Args:
            pretrained_model_name_or_path: folder or Hub name.
            subfolder: below it.
            **kwargs: see `peft.PeftConfig.from_pretrained`. `use_safetensors=False` accepts pickled weights too.

        Raises:
            ValueError: if a field or the weights' header is malformed, or weights are pickled and that was not
                allowed. For a Hub name, errors about weights are raised when the adapter is attached.
        """
        pickled = kwargs.pop("use_safetensors", True) is False
        folder = Path(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        header = find_header(folder, pickled=pickled)
        config: ESFTConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, ESFTConfig):
            return config
        if (folder / CONFIG_NAME).is_file():
            if header is not None:
                config.check_file(header)
            config._find_header = lambda: header
        else:
            download, _, _ = cls._split_kwargs(kwargs)
            name = str(pretrained_model_name_or_path)
            config._find_header = partial(find_hub_header, name, subfolder, pickled=pickled, **download)
        return config

    @classmethod
    def balance(cls, scores: ExpertScores, **kwargs: Any) -> ESFTConfig:
        """Trains the relevant experts only.

        This is the paper's choice to keep general abilities (arXiv 2407.01906, section 6.3).

        Args:
            scores: from `score_experts`.
            **kwargs: see `from_scores`.
        """
        return cls.from_scores(scores, **kwargs)

    @classmethod
    def specialise(cls, scores: ExpertScores, **kwargs: Any) -> ESFTConfig:
        """Trains relevant experts, shared experts and all non-expert modules.

        This is the paper's choice for the best result on the task alone (arXiv 2407.01906, section 6.3).

        Args:
            scores: from `score_experts`.
            **kwargs: see `from_scores`.
        """
        return cls.from_scores(scores, train_shared_experts=True, train_non_expert_modules=True, **kwargs)

    @classmethod
    def from_scores(
        cls,
        scores: ExpertScores,
        *,
        metric: Metric = "token",
        top_p: float | None = None,
        top_k: int | None = None,
        budget: float | str | Setup | None = None,
        min_experts: int = 1,
        max_experts: int | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> ESFTConfig:
        """Makes a config that trains the experts that a task uses most.

        Args:
            scores: from `score_experts`.
            metric: "token" for the token selection ratio, "gate" for the average gate score, "gate_share" for the gate
                score as a share of the layer's sum.
            top_p: the share that the chosen experts cover; None means 0.2, the paper's 0.1 for "gate".
            top_k: the same number of experts in every layer, instead of `top_p`, see `select_experts`.
            budget: share of the experts' parameters, or memory such as "24GB", for deltas of the config's `rank`.
            min_experts: the fewest experts of each layer.
            max_experts: the most experts of each layer.
            task: what the adapter is for, in words, for the model card.
            **kwargs: further fields of the config.

        Returns:
            The config. Its `selection` records how the experts were chosen.

        Raises:
            ValueError: if `scores` are not from `score_experts`, and all errors of `select_experts`.

        Example:
            >>> config = ESFTConfig.from_scores(scores, task_type="CAUSAL_LM")
        """
        if not isinstance(scores, ExpertScores):
            raise ValueError(
                f"scores are a {type(scores).__name__}, which does not say what was scored. Give what "
                "score_experts returns, or choose experts yourself: "
                "ESFTConfig(target_experts=select_experts(scores))"
            )
        memory = None
        if isinstance(budget, str | Setup):
            budget = memory = _setup_of(budget, kwargs, scores)
        target_experts = select_experts(
            scores,
            metric=metric,
            top_p=top_p,
            top_k=top_k,
            budget=budget,
            min_experts=min_experts,
            max_experts=max_experts,
        )
        if memory is not None:
            top_p = top_p_for_memory(scores, memory, metric=metric, min_experts=min_experts, max_experts=max_experts)
        elif top_p is None and top_k is None and budget is None:
            top_p = DEFAULT_TOP_P[metric]
        kinds = {"top_p": float, "top_k": int, "budget": float, "max_experts": int}  # numpy's numbers become Python's
        rule = {"top_p": top_p, "top_k": top_k, "budget": None if memory else budget, "max_experts": max_experts}
        selection = {
            **({} if task is None else {"task": task}),
            "metric": metric,
            **{name: kinds[name](value) for name, value in rule.items() if value is not None},
            **({} if memory is None else {"budget": memory.hardware}),
            **({"min_experts": int(min_experts)} if min_experts > 1 else {}),
            "averaging": scores.averaging,
            "num_tokens": scores.num_tokens,
            "num_samples": scores.num_samples,
            "num_experts": {path: scores.containers[path].num_experts for path in target_experts},
        }
        return cls(target_experts=target_experts, selection=selection, **kwargs)


def _setup_of(budget: str | Setup, fields: dict[str, Any], scores: ExpertScores) -> Setup:
    """Returns a budget of memory for deltas of the config's rank.

    Raises:
        ValueError: if the config has another rank, or trains other modules than experts, which are not counted.
    """
    more = ("train_shared_experts", "train_non_expert_modules", "modules_to_save", "trainable_token_indices")
    if others := [name for name in more if fields.get(name)]:
        raise ValueError(
            f"a budget of memory counts experts only, not {', '.join(others)}; choose experts by top_p instead"
        )
    rank = fields.get("rank")
    if isinstance(budget, str):
        return Setup.parse(budget, scores.sizes, rank=rank)
    if budget.rank != rank:
        raise ValueError(
            f"the budget is for rank {budget.rank}, but the config has rank={rank}; give the same rank to both"
        )
    return budget
