"""Trains an embedded model: a fine-grained mixture of experts, small enough for two CPU cores.

    python examples/tiny_moe/pretrain.py --cache ~/.cache/peft_esft_tiny_moe [--base deepseek]

Resumes from the last checkpoint in `--cache`. Batches depend on the step alone, so an interrupted run sees the same
data as an uninterrupted one. The result (tokenizer, bfloat16 weights, `training.json`) goes to `model/` or to
`deepseek/`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from corpus import PRETRAINING_DOMAINS, is_held_out, load_domain
from tasks import BASES


END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}
    {{- "→" -}}{%- generation -%}{{- " " + message.content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content + "\\n" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "→" -}}{%- endif -%}
"""
"""A conversation in the form of the tasks' rows: a text, a line break, an arrow and the answer."""
VOCABULARY = 4096
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
BALANCE = 0.01  # of the loss that asks for evenly used experts
SETTINGS = {
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Of both models."""
EVALUATION_BATCHES = 4


def train_tokenizer(documents: dict[str, dict[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over an equal number of bytes of each domain."""
    texts = []
    for domain in PRETRAINING_DOMAINS:
        budget = 2_000_000
        for name, text in documents[domain].items():
            if budget > 0 and not is_held_out(name):
                texts.append(text)
                budget -= len(text.encode())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def encode(documents: dict[str, str], tokenizer: PreTrainedTokenizerFast, *, held_out: bool) -> Tensor:
    """All chosen documents of one domain as one row of token ids, an end-of-text token after each."""
    texts = [text for name, text in documents.items() if is_held_out(name) == held_out]
    ids: list[int] = []
    for encoded in tokenizer(texts)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int32)


def sample_batch(streams: list[Tensor], step: int) -> Tensor:
    """Windows `[BATCH_SIZE, SEQUENCE_LENGTH]` at random places, the domains taking turns."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for row in range(BATCH_SIZE):
        stream = streams[(step * BATCH_SIZE + row) % len(streams)]
        start = int(torch.randint(len(stream) - SEQUENCE_LENGTH, (1,), generator=generator))
        rows.append(stream[start : start + SEQUENCE_LENGTH])
    return torch.stack(rows).long()


def build_olmoe() -> OlmoeForCausalLM:
    """About 10.9 M parameters: 4 layers of 64 experts, 6 of them for each token."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            intermediate_size=64,
            num_hidden_layers=4,
            num_experts=64,
            num_experts_per_tok=6,
            router_aux_loss_coef=BALANCE,
            **SETTINGS,
        )
    )


def build_deepseek() -> DeepseekV2ForCausalLM:
    """The paper's architecture in about 8.9 M parameters.

    A dense layer, then 4 layers of 64 experts, 6 of them for each token, and 2 shared ones.
    """
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            intermediate_size=384,
            moe_intermediate_size=48,
            num_hidden_layers=5,
            first_k_dense_replace=1,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            # One group of experts is none; vLLM does not know None, which means the same.
            n_group=1,
            topk_group=1,
            **SETTINGS,
        )
    )


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"olmoe": build_olmoe, "deepseek": build_deepseek}
STEPS = {"olmoe": 2200, "deepseek": 5000}


def loss_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """The loss of the next tokens and, for evenly used experts, `BALANCE` times that of the Switch Transformer."""
    outputs = model(input_ids=batch, labels=batch, output_router_logits=True)
    if outputs.aux_loss is not None:  # the model has added it by itself
        return outputs.loss
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    return outputs.loss + BALANCE * load_balancing_loss_func(outputs.router_logits, experts, top_k)


def learning_rate(step: int, steps: int) -> float:
    if step < WARM_UP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model: PreTrainedModel, streams: dict[str, Tensor]) -> dict[str, float]:
    """Mean loss in nats per token on held-out documents of each domain."""
    model.eval()
    losses = {}
    for domain, stream in streams.items():
        batches = [sample_batch([stream], 10_000_000 + index) for index in range(EVALUATION_BATCHES)]
        total = sum(float(model(input_ids=batch, labels=batch).loss) for batch in batches)
        losses[domain] = round(total / len(batches), 3)
    model.train()
    return losses


def save_atomically(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="packages, token ids and checkpoints")
    parser.add_argument("--base", choices=BASES, default="olmoe")
    parser.add_argument("--out", type=Path, help="a folder; the base's own if absent")
    parser.add_argument("--steps", type=int, help="of 16 x 256 tokens; the base's own number if absent")
    arguments = parser.parse_args()
    out = arguments.out or BASES[arguments.base]
    steps = arguments.steps or STEPS[arguments.base]

    documents = {domain: load_domain(domain, arguments.cache) for domain in PRETRAINING_DOMAINS}
    tokenizer = train_tokenizer(documents)
    token_file = arguments.cache / "tokens.pt"
    if not token_file.exists():
        save_atomically(
            {
                held_out: {domain: encode(documents[domain], tokenizer, held_out=held_out) for domain in documents}
                for held_out in (False, True)
            },
            token_file,
        )
    tokens = torch.load(token_file)
    streams = list(tokens[False].values())

    torch.manual_seed(0)
    model = BUILDERS[arguments.base]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoint = arguments.cache / f"checkpoint_{arguments.base}.pt"
    first_step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, seconds = state["step"], state["seconds"]
    model.train()
    started = time.monotonic()
    for step in range(first_step, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = sample_batch(streams, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 50 == 0 or done == steps:
            elapsed = seconds + time.monotonic() - started
            save_atomically(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "seconds": elapsed,
                },
                checkpoint,
            )
            print(f"step {done}  loss {float(loss):.3f}  {elapsed / 60:.1f} min", flush=True)
        if done % 500 == 0:
            print(evaluate(model, tokens[True]), flush=True)

    record = {
        "steps": steps,
        "tokens": steps * BATCH_SIZE * SEQUENCE_LENGTH,
        "training_tokens_per_domain": {domain: len(stream) for domain, stream in tokens[False].items()},
        "held_out_loss": evaluate(model, tokens[True]),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
