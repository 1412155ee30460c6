"""The Python examples do what their first lines say. (The C and C++ ones: test_native_build.py.)"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import liger_deploy as ld
from liger_deploy.bundle import Bundle
from liger_deploy.generate import generate
from liger_deploy.text import Text
from tests.conftest import TINY_BASE

ROOT = Path(__file__).parents[1]
PROMPT = "def add(a, b):"


@pytest.fixture
def server(tiny_bundle: Path) -> Iterator[str]:
    command = [sys.executable, ROOT / "examples" / "server.py", tiny_bundle, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.kill()
    process.wait()


def test_the_server_keeps_many_conversations(server: str, tiny_bundle: Path, tmp_path: Path) -> None:
    def post(name: str, text: str) -> str:
        with urllib.request.urlopen(f"{server}/{name}", text.encode()) as answer:
            return str(answer.read().decode())

    text = Text(Bundle.open(tiny_bundle))
    expected = text.decode(list(generate(ld.load_session(tiny_bundle), text.encode(PROMPT), 100)))
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: post(n, PROMPT)})) for n in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys("abcdefgh", expected)
    with urllib.request.urlopen(server) as answer:
        sizes = json.loads(answer.read())
    assert sizes == dict.fromkeys("abcdefgh", Bundle.open(tiny_bundle).manifest.spec.nbytes())
    with urllib.request.urlopen(f"{server}/a/state") as answer:
        (tmp_path / "a.state").write_bytes(answer.read())
    assert ld.State.load(tmp_path / "a.state").tensors["length"][0] == len(text.encode(PROMPT)) + 99
    for path, code in (("zzz/state", 404), ("a/b/c", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server}/{path}")
        assert caught.value.code == code
    with pytest.raises(urllib.error.HTTPError, match="the prompt is empty"):
        post("a", "")


def test_a_chat_moves(tiny_bundle: Path, tiny_executorch: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "move_chat.py", tiny_bundle, tiny_executorch, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True)
    here, there = done.stdout.rstrip("\n").split("\n--\n")
    assert here == there, done.stderr[-500:]
    assert len(here) > 20


def test_own_checkpoint(tmp_path: Path) -> None:
    """Convert, tune a little, merge, export, verify, generate."""
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"text": (ROOT / "README.md").read_text()[i : i + 700]}) + "\n" for i in range(0, 4900, 700))
    )
    script = [ROOT / "examples" / "own_checkpoint.sh", TINY_BASE, tmp_path / "data.jsonl", tmp_path / "out"]
    variables = {
        "FINETUNE": "--max-tokens 2000 --max-length 500",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    done = subprocess.run(script, capture_output=True, text=True, env=variables | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "14 of 14 checks pass" in done.stdout
    again = subprocess.run(script[:2], capture_output=True, text=True, env=variables)
    assert again.returncode == 2
    assert "CHECKPOINT DATA OUT" in again.stderr
