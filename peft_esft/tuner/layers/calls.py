"""What a forward pass needs to know of adapters, found out beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .resident import Key, Resident


@dataclass(eq=False)
class AdapterCall:
    """What a forward pass needs to know of the active adapters.

    A compiled graph reads this and not their names, so that it serves all adapters of equal size.

    Attributes:
        key: their names.
        expert_ids: the experts that at least one of them trains.
        index: the same as int64 `[n]`.
        slots: the layer's `functional.expert_slots` of them, if it needs any.
        deltas: by weight name, if the effective rows are the base's and these; for compiled graphs, since whatever
            moves or shards parameters replaces them.
        rows: the effective rows by weight name, if they are known to hold.
        parameters: the deltas and factors that these were computed from. Who makes them trainable by other means than
            `set_adapter` tells nobody, and rows hold no longer.
    """

    key: Key
    expert_ids: tuple[int, ...]
    index: Tensor
    slots: Tensor | None
    deltas: dict[str, Tensor] | None
    rows: dict[str, Tensor] | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)

    def forget_rows(self) -> None:
        """To be called when the adapters are trained, after which the rows would be old ones."""
        self.rows, self.parameters = None, []


@dataclass(frozen=True, eq=False)
class MixedPlan:
    """Where the rows of the adapters of a batch lie; holding it keeps them there.

    Attributes:
        residents: the rows of each; None for one that leaves this layer as it is.
        bank: by weight name, all rows `[n, ...]`.
        slots: int64 `[adapters, E + identity experts]`, the layer's `functional.expert_slots`, if it needs any.
    """

    residents: list[Resident | None]
    bank: dict[str, Tensor]
    slots: Tensor | None
