"""A conversation with a model whose adapters can be switched."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from .loading import load_base, load_tokenizer, names_of


class _Pieces(TextStreamer):
    """Hands an answer on piece by piece, as it is decoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, see: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._see = see

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the streamer with each piece."""
        if not self.text:
            text = text.lstrip()
        self.text += text
        if self._see is not None:
            self._see(text)


@dataclass
class Conversation:
    """A conversation, with the base or one of the adapters.

    Attributes:
        model: the base, or a `PeftModel` around it.
        tokenizer: makes tokens of messages.
        adapters: the names of the adapters.
        adapter: the one that answers; None for the base.
        system: the system message.
        max_new_tokens: of an answer.
        temperature: 0 takes the most probable token.
        messages: what was said so far.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    adapters: list[str]
    adapter: str | None
    system: str | None
    max_new_tokens: int
    temperature: float
    messages: list[dict[str, str]] = field(default_factory=list)
    last_message: str = ""

    @classmethod
    def load(cls, options: argparse.Namespace) -> Conversation:
        """Loads a model and its adapters.

        Raises:
            ValueError: if two adapters have one name, an adapter does not fit, or a number is out of range.
        """
        if options.max_new_tokens < 1 or options.temperature < 0:
            raise ValueError("--max-new-tokens is at least 1, and --temperature at least 0")
        names = names_of(options.adapters)
        tokenizer = load_tokenizer(options.model, list(names.values()))
        if options.system is not None and tokenizer.chat_template is None:
            raise ValueError(f"--system needs a chat template, which the tokenizer of {options.model} does not have")
        base = load_base(options)
        model: Any = base
        for name, folder in names.items():
            if model is base:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
        model.eval()
        first = next(iter(names), None)
        return cls(model, tokenizer, list(names), first, options.system, options.max_new_tokens, options.temperature)

    def introduction(self) -> str:
        """Says who answers, and how."""
        lines = [f"answers: {self.adapter or 'the base'}"]
        if len(self.adapters) > 1:
            lines[0] += f"; adapters: {', '.join(self.adapters)}"
        if self.tokenizer.chat_template is None:
            lines.append("the tokenizer has no chat template (a base model): each line is continued as plain text")
        return "\n".join(lines)

    def obey(self, command: str, argument: str) -> str | None:
        """Does what a line with a slash asks for.

        Returns:
            What to tell the user; None if the last message is to be answered again.
        """
        if command == "/base" or (command == "/adapter" and argument in self.adapters):
            self.adapter, self.messages = argument or None, []
            return f"answers: {self.adapter or 'the base'}; the conversation starts anew"
        if command == "/adapter":
            return f"no adapter {argument!r}; there are: {', '.join(self.adapters) or 'none'}"
        if command == "/new":
            self.messages = []
            return "the conversation starts anew"
        if command == "/again" and self.last_message:
            if self.messages:
                del self.messages[-2:]
            return None
        return "nothing was asked yet" if command == "/again" else f"unknown command {command}"

    def answer(self, message: str, print_piece: Callable[[str], None] | None = None) -> str:
        """Answers a message; `print_piece` is called with each piece of the answer."""
        self.last_message = message
        inputs = self._inputs(message).to(self.model.device)
        pieces = _Pieces(self.tokenizer, print_piece)
        sampling = {"temperature": self.temperature} if self.temperature else {}
        with self._active(), torch.inference_mode():
            self.model.generate(
                **inputs,
                streamer=pieces,
                max_new_tokens=self.max_new_tokens,
                do_sample=bool(self.temperature),
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
        answer = pieces.text.strip()
        if self.tokenizer.chat_template is not None:
            self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        return answer

    def _inputs(self, message: str) -> Any:
        if self.tokenizer.chat_template is None:
            return self.tokenizer(message, return_tensors="pt")
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        said = [*system, *self.messages, {"role": "user", "content": message}]
        return self.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    def _active(self) -> Any:
        if not self.adapters:
            return nullcontext()
        if self.adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(self.adapter)
        return nullcontext()
