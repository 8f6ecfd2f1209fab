"""Hooks on modules that other threads may be calling."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import Any

from torch import nn


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, for the calls of the thread that asks; calls of other threads go on as if there were none.

    Who leaves them alone must do so before looking at what the hook is given: while one thread registers or removes a
    hook `with_kwargs`, PyTorch may call it in another thread without the keywords
    (`torch.nn.Module.register_forward_hook` keeps in two dictionaries which hooks there are, and which want keywords).
    """
    thread = get_ident()

    @wraps(hook)
    def hook_of_thread(module: nn.Module, *arguments: Any) -> Any:
        return hook(module, *arguments) if get_ident() == thread else None

    return hook_of_thread
