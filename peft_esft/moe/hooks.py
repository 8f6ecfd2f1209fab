"""Limits a hook to the calls of one thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import Any

from torch import nn


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a hook that runs for the calls of the present thread, and does nothing for those of other threads.

    The thread is checked before the arguments are read. While one thread registers or removes a hook `with_kwargs`,
    PyTorch may call the hook in another thread without the keywords, since `torch.nn.Module.register_forward_hook`
    keeps in two dictionaries which hooks there are and which of them take keywords.
    """
    thread = get_ident()

    @wraps(hook)
    def hook_of_thread(module: nn.Module, *arguments: Any) -> Any:
        return hook(module, *arguments) if get_ident() == thread else None

    return hook_of_thread
