"""The chat template of the embedded models: the form of the tasks' rows, with marks around the answers."""

from __future__ import annotations

import pytest
from pretrain import CHAT_TEMPLATE
from transformers import AutoTokenizer

import tasks


@pytest.mark.parametrize("base", tasks.BASES)
def test_a_conversation_has_the_form_of_the_tasks_and_marks_the_answers(base):
    assert (tasks.BASES[base] / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(tasks.BASES[base])
    prompt, answer = tasks.load_task("verses", "train")[0]
    said = [{"role": "user", "content": prompt.removesuffix("\n→ ")}, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == f"{prompt}{answer}<|endoftext|>"
    opened = tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True)
    assert opened == prompt.rstrip(" ")
    encoded = tokenizer.apply_chat_template(said * 2, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == f" {answer}<|endoftext|>" * 2
