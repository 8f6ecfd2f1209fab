"""Ends training after the step at hand when the user or the system asks for it, with a checkpoint to go on from."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):
    """Turns Ctrl-C (SIGINT) and SIGTERM into a checkpoint and the end of training.

    The step that is running is finished first. A second Ctrl-C ends the program at once, without a checkpoint.

    Attributes:
        stopped: True if training was ended by a signal.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals for the time of the context, which has to be entered in the main thread."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint and the end of training if any process got a signal."""
        asked = self._is_asked
        if dist.is_available() and dist.is_initialized():
            # Signals reach the processes at different steps, and all of them take part in saving.
            flag = torch.tensor(int(asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag)
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_asked = True
