"""From text to batches, with the embedded model's tokenizer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model

from peft_esft import ESFTConfig, score_experts, text_batches
from peft_esft.analysis import co_occurrence, forgetting

import tasks


TEXTS = ["In the beginning", "God created the heaven and the earth.", "And", "the earth was without form"]


@pytest.fixture
def tokenizer():
    return tasks.load_base()[1]


@pytest.mark.parametrize("rows", [TEXTS, [{"text": text, "id": 1} for text in TEXTS]], ids=["strings", "text column"])
def test_texts_become_padded_batches(tokenizer, rows):
    batches = list(text_batches(rows, tokenizer, batch_size=3))
    assert [batch["input_ids"].shape[0] for batch in batches] == [3, 1]
    decoded = [
        tokenizer.decode(ids[mask.bool()])
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert decoded == TEXTS


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        list(text_batches([{"text": "a \ud800"}], tokenizer))


def test_messages_go_through_the_chat_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (batch,) = text_batches([{"messages": [{"role": "user", "content": "Who?"}]}], tokenizer)
    assert tokenizer.decode(batch["input_ids"][0]) == "<user>Who?"


def _answers(batch, tokenizer):
    return [tokenizer.decode(row[row != -100]) for row in batch["labels"]]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's own default
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_completions_as_trl_trains_on_them(tokenizer, side):
    """The labels are those of TRL's own trainer on the same rows."""
    from trl import SFTConfig, SFTTrainer

    tokenizer.padding_side = side
    rows = [{"prompt": p, "completion": c} for p, c in tasks.load_task("verses", "train")[:3]]
    # The space at the prompt's end is a token of its own, or part of the answer's first one.
    rows += [{"prompt": "Question? ", "completion": "Answer one"}, {"prompt": "Question?", "completion": "Answer one"}]
    (batch,) = text_batches(rows, tokenizer, answers_only=True)
    answers = _answers(batch, tokenizer)
    assert [answer.strip() for answer in answers] == [row["completion"] + tokenizer.eos_token for row in rows]
    settings = SFTConfig(output_dir="unused", report_to=[], use_cpu=True, bf16=False, completion_only_loss=True)
    trainer = SFTTrainer(
        tasks.load_base()[0], settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    for number, trained in enumerate(trainer.train_dataset):
        mask = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][mask].tolist() == trained["input_ids"]
        assert batch["labels"][number][mask].tolist() == trained["labels"]


def test_labels_of_conversations_are_what_the_template_marks(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}<{{ m.content }}>{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Who made it?"}, {"role": "assistant", "content": "God created it."}]
    rows = [{"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}]
    (batch,) = text_batches(rows, tokenizer, answers_only=True)
    assert _answers(batch, tokenizer) == ["God created it."] * 2
    assert torch.equal(*batch["input_ids"])
    (cut,) = text_batches(rows, tokenizer, answers_only=True, max_length=2)
    assert (cut["labels"] == -100).all()


def test_rows_without_answers_are_refused_where_only_answers_count(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for row, message in (
        ("text", "a text has no answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no token of its messages is marked as an answer"),
        ({"prompt": "x", "completion": [{"role": "assistant", "content": "x"}]}, "are str and list; give two texts"),
        ({"prompt": "x"}, "it has prompt; needed"),
    ):
        with pytest.raises(ValueError, match=message):
            list(text_batches([row], tokenizer, answers_only=True))


def test_answers_of_rows_are_scored_as_those_of_batches(tokenizer):
    model = tasks.load_base()[0]
    rows = [{"prompt": p, "completion": c} for p, c in tasks.load_task("verses", "train")[:4]]
    scores = score_experts(model, rows, tokenizer=tokenizer, answers_only=True, progress=False)
    (batch,) = text_batches(rows, tokenizer, answers_only=True)
    assert scores.num_tokens == int((batch["labels"] != -100).sum())
    assert scores == score_experts(model, [batch], answers_only=True, progress=False)


def test_samples_are_cut_and_batches_are_lazy(tokenizer):
    def endless():
        while True:
            yield "word " * 100

    batch = next(text_batches(endless(), tokenizer, batch_size=2, max_length=5))
    assert batch["input_ids"].shape == (2, 5)


def test_scores_of_texts_do_not_depend_on_the_batch_size(tokenizer):
    model, _ = tasks.load_base()
    scores = [score_experts(model, text_batches(TEXTS, tokenizer, batch_size=size), progress=False) for size in (1, 4)]
    for path, values in scores[0].token().items():
        torch.testing.assert_close(values, scores[1].token()[path])


def test_bad_rows_are_refused(tokenizer):
    with pytest.raises(ValueError, match="it has prompt; needed: text, messages, or prompt and completion"):
        list(text_batches([{"prompt": "x"}], tokenizer))
    with pytest.raises(ValueError, match="it is a int; needed"):
        list(text_batches([3], tokenizer))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"the chat template cannot format its messages: .*chat_template"):
        list(text_batches([{"messages": [{"role": "user", "content": "Who?"}]}], tokenizer))
    tokenizer.chat_template = "{{ messages[1].content + 1 }}"
    with pytest.raises(ValueError, match="the chat template cannot format its messages: "):
        list(text_batches([{"messages": [{"role": "user", "content": "Who?"}]}], tokenizer))
    with pytest.raises(ValueError, match=r"message 1 has \['from', 'value'\]; expected a dict of role and content"):
        list(text_batches([{"messages": [{"from": "human", "value": "Who?"}]}], tokenizer))
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad token"):
        list(text_batches(TEXTS, tokenizer))
    assert len(list(text_batches(TEXTS, tokenizer, batch_size=1))) == 4


def test_a_single_text_and_a_dict_of_splits_are_no_samples(tokenizer):
    model = tasks.load_base()[0]
    with pytest.raises(ValueError, match="data is a single string"):
        score_experts(model, TEXTS[0], tokenizer=tokenizer)
    splits = DatasetDict({name: Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")})
    with pytest.raises(ValueError, match=r"data is a DatasetDict of \['train', 'test'\].* one of its splits"):
        score_experts(model, splits, tokenizer=tokenizer)
    assert len(list(text_batches(splits["train"], tokenizer, batch_size=2))) == 2


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_sizes_of_batches_are_at_least_1(tokenizer, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        text_batches(TEXTS, tokenizer, **{name: 0})


@pytest.mark.parametrize("measure", [score_experts, co_occurrence, forgetting])
@pytest.mark.parametrize("kind", ["texts", "one batch", "tensors"])
def test_what_is_no_batch_is_named(measure, kind):
    model = get_peft_model(tasks.load_base()[0], ESFTConfig(target_experts={0: [1]}))
    tokens = torch.tensor([[3, 4]])
    batches = {"texts": TEXTS, "one batch": {"input_ids": tokens}, "tensors": [tokens]}[kind]
    with pytest.raises(ValueError, match=r"a batch is a (str|Tensor); expected a dict of tensors.*\[batch\]"):
        measure(model, batches)


def test_a_tokenizer_makes_batches_of_texts(tokenizer):
    model = tasks.load_base()[0]
    texts = ["a few words", "and some more of them"]
    scores = score_experts(model, texts, tokenizer=tokenizer, progress=False)
    expected = score_experts(model, text_batches(texts, tokenizer), progress=False)
    assert scores == expected
