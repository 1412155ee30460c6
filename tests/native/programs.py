"""How the tests call what `make native` built."""

from __future__ import annotations

import subprocess
from pathlib import Path

import onnxruntime

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "native"
RUN = ROOT / "liger_deploy" / "native" / "liger-run"
RUNTIME = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
PROMPT = "def add(a, b):\n    return a + b\n\n\ndef "


def call(*words: object, rc: int = 0) -> str:
    """Standard output of liger-run; its one line of error if it is to fail."""
    command = [RUN, *(word if isinstance(word, bytes) else str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, env={"LIGER_ONNXRUNTIME": str(RUNTIME)})
    assert done.returncode == rc, done.stderr
    if rc:
        assert done.stderr.count("\n") == 1, done.stderr
        assert not done.stdout
        return done.stderr
    return done.stdout


def probe(*words: object, stdin: str = "") -> str:
    """Standard output of liger-probe."""
    done = subprocess.run([BUILD / "liger-probe", *map(str, words)], input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ids(text: str) -> list[int]:
    """Token ids of a line of them."""
    return [int(word) for word in text.split()]
