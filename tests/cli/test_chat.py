"""`peft-esft chat` through a pipe: who answers, switching, and a base without a chat template."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_esft import ESFTConfig, ESFTQuantizationConfig
from peft_esft.cli.main import main

from repository import ROOT


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
SHORT = ["--max-new-tokens", "8", "--dtype", "float32"]
QUESTION = "And he said unto them, Go ye into all the world."


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters with large changes, so that each answers otherwise."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("law", "intent")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        config = ESFTConfig(target_experts={layer: list(range(64)) for layer in range(4)}, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        model.save_pretrained(folder / name)
    return [str(folder / "law"), str(folder / "intent")]


def chat(lines, arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = main(["chat", *arguments, *SHORT])
    output = capsys.readouterr()
    return code, output.out, output.err


@torch.no_grad()
def expected_answer(folder=None, messages=None, text=None, **settings):
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, **settings).eval()
    if folder:
        model = PeftModel.from_pretrained(model, folder).eval()
    if text is None:
        messages = messages or [{"role": "user", "content": QUESTION}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


def test_adapters_are_switched_and_compared_with_the_base(adapters, monkeypatch, capsys):
    lines = [QUESTION, "/base", "/again", "/adapter intent", "/again", "/adapter nobody", "/quit", "not read"]
    code, out, err = chat(lines, [MODEL, *adapters, "--json"], monkeypatch, capsys)
    assert code == 0
    turns = json.loads(out)
    assert [turn["adapter"] for turn in turns] == ["law", None, "intent"]
    answers = [expected_answer(adapters[0]), expected_answer(), expected_answer(adapters[1])]
    assert [turn["answer"] for turn in turns] == answers
    assert len(set(answers)) == 3
    assert "answers: law; adapters: law, intent" in err
    assert "no adapter 'nobody'; there are: law, intent" in err


def test_the_base_may_be_in_few_bits(adapters, monkeypatch, capsys):
    code, out, _ = chat(
        [QUESTION, "/base", "/again"], [MODEL, adapters[0], "--bits", "4", "--json"], monkeypatch, capsys
    )
    assert code == 0
    settings = {"quantization_config": ESFTQuantizationConfig(bits=4)}
    answers = [expected_answer(adapters[0], **settings), expected_answer(**settings)]
    assert [turn["answer"] for turn in json.loads(out)] == answers


def test_answers_alone_go_to_the_standard_output(adapters, monkeypatch, capsys):
    code, out, err = chat([QUESTION], [MODEL, adapters[0]], monkeypatch, capsys)
    assert code == 0
    assert next(line.strip() for line in out.splitlines() if line.strip()) in expected_answer(adapters[0])
    assert "answers: law" in err and "/adapter NAME" not in err


def test_a_conversation_goes_on_until_it_is_new(monkeypatch, capsys):
    lines = [QUESTION, "And then?", "/new", "And then?"]
    _, out, _ = chat(lines, [MODEL, "--json"], monkeypatch, capsys)
    first, second, third = [turn["answer"] for turn in json.loads(out)]
    said = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    assert second == expected_answer(messages=said)
    assert third == expected_answer(messages=said[-1:])


def test_a_base_without_a_template_continues_the_text_and_says_so(tmp_path, monkeypatch, capsys):
    shutil.copytree(MODEL, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    code, out, err = chat([QUESTION], [str(tmp_path / "base"), "--json"], monkeypatch, capsys)
    assert code == 0 and "no chat template (a base model): each line is continued as plain text" in err
    assert json.loads(out)[0]["answer"] == expected_answer(text=QUESTION)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is at least 1"),
        (["law", "other/law"], "two adapters are called 'law'; name one of them: NAME=other/law"),
    ],
)
def test_refusals(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("law", "other/law"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text('{"peft_type": "ESFT"}')
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", MODEL, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_nothing_asked_nothing_said(monkeypatch, capsys):
    code, out, err = chat(["/again", "/what"], [MODEL], monkeypatch, capsys)
    assert code == 0 and out.strip() == ""
    assert "nothing was asked yet" in err and "unknown command /what" in err
