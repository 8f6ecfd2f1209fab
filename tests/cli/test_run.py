"""`peft-esft run`: programs that do not import peft_esft know its adapters, in their child processes too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_esft import ESFTConfig
from peft_esft.cli.main import main
from peft_esft.cli.run import command_of

import tasks
from repository import ROOT


MODEL = str(ROOT / "examples" / "tiny_moe" / "model")
KNOWN = "from peft import PeftType; print(hasattr(PeftType, 'ESFT'))"


def run(*arguments, cwd=None, **env):
    command = [sys.executable, "-m", "peft_esft", "run", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [env.pop("PYTHONPATH", None)])])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_scripts_and_their_children_know_the_tuner_and_keep_arguments_and_exit_code(tmp_path):
    (tmp_path / "child.py").write_text(KNOWN)
    (tmp_path / "parent.py").write_text(
        "import multiprocessing, subprocess, sys\n"
        "def known():\n    from peft import PeftType\n    return hasattr(PeftType, 'ESFT')\n"
        "if __name__ == '__main__':\n"
        "    import importlib.util\n"
        "    print('torch' in sys.modules, importlib.util.find_spec('peft') is not None, known(), sys.argv[1:])\n"
        "    sys.stdout.flush()\n"
        "    print(subprocess.check_output([sys.executable, 'child.py'], text=True).strip())\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.apply(known))\n"
        "    sys.exit(7)\n"
    )
    result = run("--", "parent.py", "--json", "-h", "a b", cwd=tmp_path)
    assert result.stdout.splitlines() == ["False True True ['--json', '-h', 'a b']", "True", "True"], result.stderr
    assert result.returncode == 7


def test_modules_and_programs_are_found(tmp_path):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__main__.py").write_text(KNOWN)
    for program in (("some_package",), ("python", "-c", KNOWN)):
        result = run(*program, cwd=tmp_path)
        assert result.stdout.strip() == "True", result.stderr
    assert command_of("json.tool") == [sys.executable, "-m", "json.tool"]
    assert command_of("peft-esft" if os.name == "posix" else "python")[0].startswith("/")


def test_a_program_that_is_not_there_is_refused(capsys):
    for program in ("no-such-program", "no.such.module", "missing.py"):
        assert main(["run", "--", program]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"peft-esft: {program!r} is neither a program") and error.count("\n") == 1


def test_a_sitecustomize_of_the_user_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.from_user = True\n")
    code = f"import sys; print(sys.from_user, sys.modules['sitecustomize'].__file__); {KNOWN}"
    result = run("python", "-c", code, PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == ["True", str(tmp_path / "sitecustomize.py"), "True"], result.stderr


def test_a_python_without_the_package_says_so(tmp_path):
    """Another environment, which has PEFT only."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("")
    startup = ROOT / "peft_esft" / "cli" / "startup"
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import sitecustomize"],  # without its site-packages
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(startup), str(tmp_path)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "has PEFT, but not peft_esft; install it there too" in result.stderr


def choices_of(rows):
    return sorted({completion for _, completion in rows})


@torch.no_grad()
def accuracy(model, tokenizer, rows, choices):
    """Which choice is the most probable continuation, as lm-eval's `multiple_choice` counts it."""
    right = 0
    for prompt, answer in rows:
        sums = []
        for choice in choices:
            # lm-eval counts spaces at the prompt's end to the choice.
            start, ids = tokenizer(prompt.rstrip())["input_ids"], tokenizer(prompt + choice)["input_ids"]
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(start), len(ids))))
        right += choices[sums.index(max(sums))] == answer
    return right / len(rows)


@pytest.mark.slow
def test_lm_eval_measures_base_and_adapter(tmp_path):
    """A task of files of its own; the figures are those that the library's models give."""
    pytest.importorskip("lm_eval")
    rows, choices = tasks.load_task("verses", "train")[:24], choices_of(tasks.load_task("verses", "train"))
    base, tokenizer = tasks.load_base()
    config = ESFTConfig(target_experts={layer: [*range(0, 64, 4)] for layer in range(4)}, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = tasks.make_batch(rows, tokenizer)  # what it is asked about later, so that few steps do
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some experts are untrained after so few steps
        model.save_pretrained(tmp_path / "adapter")
    records = [{"prompt": prompt, "choices": choices, "answer": choices.index(answer)} for prompt, answer in rows]
    (tmp_path / "books.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "books.yaml").write_text(
        f"task: books\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'books.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\n"
        "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    found = {}
    for name, more in (("base", ""), ("adapter", f",peft={tmp_path / 'adapter'}")):
        result = run(
            *("--", "lm_eval", "--model", "hf", "--model_args", f"pretrained={MODEL},dtype=float32{more}"),
            *("--tasks", "books", "--include_path", tmp_path / "tasks", "--device", "cpu", "--batch_size", "16"),
            *("--output_path", tmp_path / name),
            cwd=tmp_path,
            HF_HOME=str(tmp_path / "cache"),
        )
        assert result.returncode == 0, result.stderr
        (file,) = (tmp_path / name).rglob("results_*.json")
        found[name] = json.loads(file.read_text())["results"]["books"]["acc,none"]
    adapted = PeftModel.from_pretrained(tasks.load_base()[0], tmp_path / "adapter").eval()
    expected = accuracy(adapted, tokenizer, rows, choices)
    with adapted.disable_adapter():
        assert found["base"] == pytest.approx(accuracy(adapted, tokenizer, rows, choices))
    assert found["adapter"] == pytest.approx(expected)
    assert found["adapter"] > found["base"] + 0.1
