"""Colours text by how many of a token's choices fall on trained experts (arXiv 2407.01906, figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..moe.containers import find_experts
from ..moe.routing import Routing
from ..scoring.selection import Selection
from ..scoring.watching import run_batches
from ..tuner.config_checks import check_target_experts
from ..tuner.targets import resolve_target_experts
from .changes import esft_layers


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenSpan:
    """One token, or several that share a character.

    Attributes:
        start, end: its characters in the text.
        hits: choices, over all layers, that fall on trained experts.
        choices: choices over all layers.
    """

    start: int
    end: int
    hits: int
    choices: int

    @property
    def share(self) -> float:
        """`hits / choices`."""
        return self.hits / max(1, self.choices)


@dataclass(frozen=True)
class TokenView:
    """Texts, and how many choices of each token fall on trained experts. A notebook shows the texts coloured.

    Attributes:
        texts: the texts.
        spans: the tokens of each text, in order.
    """

    texts: list[str]
    spans: list[list[TokenSpan]]

    @property
    def mean_share(self) -> float:
        """Share of all choices that fall on trained experts."""
        spans = [span for row in self.spans for span in row]
        return sum(span.hits for span in spans) / max(1, sum(span.choices for span in spans))

    def html(self) -> str:
        """Returns an HTML fragment with its own style, readable on light and on dark pages. The text is escaped."""
        deepest = max((span.share for row in self.spans for span in row), default=0.0)
        blocks = [_block(text, row, deepest) for text, row in zip(self.texts, self.spans, strict=True)]
        legend = "".join(
            f'<span style="background:{_colour(step / 4)}">&nbsp;{deepest * step / 4:.0%}&nbsp;</span>'
            for step in range(5)
        )
        return (
            '<figure class="token-view" style="margin:1em 0">'
            f'<figcaption style="font-size:.9em">share of a token\'s choices that fall on trained experts: {legend}; '
            f"{self.mean_share:.1%} of all</figcaption>{''.join(blocks)}</figure>"
        )

    def save(self, path: str | Path) -> None:
        """Writes the view as a page."""
        Path(path).write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<title>Tokens on trained experts</title>"
            "<style>:root{color-scheme:light dark}body{font-family:system-ui,sans-serif;max-width:60em;"
            f"margin:1em auto;padding:0 1em}}</style></head><body>{self.html()}</body></html>\n",
            encoding="utf-8",
        )

    def _repr_html_(self) -> str:
        return self.html()


def token_view(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    experts: Selection | None = None,
    max_length: int = 1024,
) -> TokenView:
    """Counts, token by token, the choices that fall on trained experts.

    Args:
        model: a transformers model, with or without adapters.
        tokenizer: its tokenizer. It must be a fast one, which knows the characters of each token.
        texts: one text or several.
        experts: the experts that count, by container path or layer; None means those of the active adapters.
        max_length: texts are cut to so many tokens.

    Returns:
        The counts, which can be shown as HTML.

    Raises:
        ValueError: if there are no experts to look for, the model lacks one of them, or the tokenizer is not fast.

    Example:
        >>> token_view(model, tokenizer, "What is the capital of France?").save("tokens.html")
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("token_view needs a fast tokenizer, because only that knows the characters of each token")
    containers = find_experts(model)
    trained = _active_experts(model) if experts is None else check_target_experts(experts)
    if not trained:
        raise ValueError("experts is empty; leave it out to count the experts of the active adapters")
    masks = {path: torch.zeros(container.num_experts + 1, dtype=torch.bool) for path, container in containers.items()}
    for path, ids in resolve_target_experts(trained, containers).items():
        masks[path][ids] = True
    spans = []
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=max_length)
        counts = _count(model, torch.tensor([encoded["input_ids"]]), masks)
        spans.append(_join_spans(encoded["offset_mapping"], counts.T.tolist()))
    return TokenView(texts, spans)


def _count(model: nn.Module, input_ids: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Hits and choices of each token, int64 `[2, T]`."""
    counts = torch.zeros(2, input_ids.shape[1], dtype=torch.int64)

    def see(path: str, routing: Routing, counted: Tensor) -> None:
        mask = masks[path]
        chosen = routing.top_k_weights.cpu() > 0
        index = routing.top_k_index.cpu().clamp(max=mask.numel() - 1)
        counts[0] += (mask[index] & chosen).sum(-1)
        counts[1] += chosen.sum(-1)

    if input_ids.numel():
        run_batches(model, [{"input_ids": input_ids}], input_ids.numel(), see)
    return counts


def _active_experts(model: nn.Module) -> Selection:
    containers = find_experts(model)
    experts = {}
    for layer in esft_layers(model):
        ids = layer.union_of_experts(layer.adapters_here(layer.active_adapters))
        if ids and layer.path in containers:
            experts[layer.path] = ids
    if not experts:
        raise ValueError("the model has no active ESFT adapter; say which experts to count with experts=...")
    return experts


def _join_spans(offsets: Sequence[tuple[int, int]], counts: Sequence[Sequence[int]]) -> list[TokenSpan]:
    """Makes one span of tokens that share a character, and leaves out tokens without characters."""
    spans: list[TokenSpan] = []
    for (start, end), (hits, choices) in zip(offsets, counts, strict=True):
        if end <= start:
            continue
        span = TokenSpan(start, end, hits, choices)
        if spans and start < spans[-1].end:
            last = spans.pop()
            span = TokenSpan(last.start, max(last.end, end), last.hits + hits, last.choices + choices)
        spans.append(span)
    return spans


def _block(text: str, spans: Sequence[TokenSpan], deepest: float) -> str:
    """The HTML of one text."""
    pieces, done = [], 0
    for span in spans:
        pieces.append(escape(text[done : span.start]))
        pieces.append(
            f'<span style="background:{_colour(span.share / max(deepest, 1e-9))}" '
            f'title="{span.hits} of {span.choices} choices">{escape(text[span.start : span.end])}</span>'
        )
        done = span.end
    pieces.append(escape(text[done:]))
    style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"
    return f'<p style="{style}">{"".join(pieces)}</p>'


def _colour(depth: float) -> str:
    # One transparent hue keeps the page's own colours of text and ground, light or dark.
    return f"rgba(230,120,0,{0.75 * depth:.3f})"
