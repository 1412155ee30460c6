"""The browser page in headless Chromium: the embedded model's text and tokens are Python's, and its states move."""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import liger_deploy as ld
from liger_deploy.bundle import Bundle
from liger_deploy.generate import generate
from liger_deploy.text import Text
from tests.native.programs import ROOT, ids
from tests.test_native_text import strings, with_tokenizer

ORT = ROOT / "tests" / "node" / "node_modules" / "onnxruntime-web" / "dist"
PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]
PROMPT = "def add(a, b):"


class Files(SimpleHTTPRequestHandler):
    """The page, ONNX Runtime's web build as /ort, and a bundle as /bundle."""

    def __init__(self, *arguments: Any, bundle: Path, **named: Any) -> None:
        self.places = {"ort": ORT, "bundle": bundle, "": ROOT / "runtimes" / "web"}
        super().__init__(*arguments, **named)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.split("?")[0].lstrip("/").partition("/")
        return str(self.places[first] / rest if rest else self.places[""] / (first or "index.html"))

    def log_message(self, *_: object) -> None:
        """No line a request."""


@pytest.fixture
def page(tiny_bundle: Path, tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, bundle=tiny_bundle))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = str(PROGRAMS[0])
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(PROGRAMS[1])))
    driver.get(f"http://127.0.0.1:{server.server_port}/")
    yield lambda name: driver.find_element(By.ID, name)
    driver.quit()
    server.shutdown()


def until(condition: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.1)


@pytest.mark.skipif(None in PROGRAMS or not ORT.exists(), reason="needs chromium and chromium-driver")
def test_the_page(page: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    text, session = Text(Bundle.open(tiny_bundle)), ld.load_session(tiny_bundle)
    until(lambda: page("status").text.startswith("ready"))
    assert f"{session.spec.nbytes():,} bytes" in page("status").text
    expected = list(generate(session, text.encode(PROMPT), 64))
    session.step([expected[-1]])  # as the page does

    def run(prompt: str, count: int) -> list[int]:
        for name, value in (("prompt", prompt), ("count", str(count))):
            page(name).clear()
            page(name).send_keys(value)
        page("go").click()
        until(lambda: page("go").is_enabled())
        return ids(page("text").get_attribute("data-tokens"))

    assert run(PROMPT, 64) == expected
    assert page("text").get_attribute("textContent") == PROMPT + text.decode(expected)
    assert "tokens/s" in page("status").text
    page("save").click()
    file = tmp_path / "chat.safetensors"
    until(file.exists)
    other = ld.load_session(tiny_bundle)
    other.load_state(ld.State.load(file))
    following = text.encode(" and")[1:]
    rest = list(generate(session, following, 20))
    assert list(generate(other, following, 20)) == rest
    page("reset").click()
    session.step([rest[-1]])
    session.state().save(tmp_path / "python.safetensors")
    page("file").send_keys(str(tmp_path / "python.safetensors"))
    until(lambda: page("status").text.startswith("loaded"))
    assert run(" and", 20) == list(generate(session, following, 20))
    (tmp_path / "junk").write_bytes(b"junkjunkjunk")
    page("file").send_keys(str(tmp_path / "junk"))
    until(lambda: "not a state file" in page("status").text)


@pytest.mark.parametrize("kind", ["embedded", "gpt2", "llama3", "qwen"])
def test_prompts_are_encoded_as_in_python(kind: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """2,000 strings in Node, whose regular expressions are the browser's."""
    bundle = with_tokenizer(kind, tiny_bundle, tmp_path / "b")
    given = random.Random(2).sample(strings(10_000), 2000)
    done = subprocess.run(
        ["node", ROOT / "tests" / "node" / "encode.mjs", bundle], input="\0".join(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = Text(Bundle.open(bundle))
    for one, line in zip(given, done.stdout.splitlines(), strict=True):
        assert ids(line) == text.encode(one), repr(one)
