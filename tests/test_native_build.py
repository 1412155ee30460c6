"""What an application's developer does with the native SDK: sanitizers, fuzzing, find_package, ARM."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from liger_deploy.bundle import Bundle
from liger_deploy.text import Text
from tests.native.programs import BUILD, PROMPT, ROOT, RUNTIME, call, ids

ARM = ROOT / "build" / "aarch64" / "liger-run"


def run(*words: object, **variables: str) -> str:
    """Standard output of a command that succeeds."""
    command = [word if isinstance(word, bytes) else str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def state(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "x.state"
    call(tiny_bundle, "--tokens", "5 6", "--max-new-tokens", 1, "--save-state", path)
    return path


def test_the_unit_tests_pass() -> None:
    assert run(BUILD / "liger-unit") == "every check passed\n"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_under_sanitizers(preset: str, tiny_bundle: Path, state: Path) -> None:
    """The unit tests, 64 threads among them; and broken files under the first."""
    build = ROOT / "build" / preset
    run("cmake", "-S", ROOT, "--preset", preset, f"-DNLOHMANN_JSON={json_headers()}")
    run("cmake", "--build", build, "--target", "liger-unit", "liger-fuzz")
    assert run(build / "liger-unit") == "every check passed\n"
    if preset == "asan":
        run(build / "liger-fuzz", tiny_bundle, state, 2000)


def json_headers() -> str:
    cache = (BUILD / "CMakeCache.txt").read_text().splitlines()
    return next(line.split("=", 1)[1] for line in cache if line.startswith("NLOHMANN_JSON:"))


@pytest.mark.slow
def test_broken_files_never_crash(tiny_bundle: Path, state: Path) -> None:
    """50,000 mutations of a manifest, 2,500 of a tokenizer and 50,000 of a state; most are refused."""
    manifests, tokenizers, states = ids(run(BUILD / "liger-fuzz", tiny_bundle, state, 50_000))
    assert manifests > 30_000
    assert tokenizers > 1_500
    assert states > 30_000


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDK where `cmake --install` puts it."""
    prefix = tmp_path_factory.mktemp("sdk")
    run("cmake", "--install", BUILD, "--component", "sdk", "--prefix", prefix)
    return prefix


def built(example: str, installed: Path, folder: Path) -> Path:
    run("cmake", "-S", ROOT / "examples" / example, "-B", folder, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", folder)
    return folder / example


def test_the_c_example(installed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Found by find_package, compiled as C; its greedy text is liger-run's."""
    program = built("c_embed", installed, tmp_path / "c")
    greedy, sampled = run(program, tiny_bundle, PROMPT, RUNTIME).split("\n--\n")
    assert greedy + "\n" == call(tiny_bundle, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 40)
    assert sampled != greedy
    failed = subprocess.run([program, tmp_path, "x"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr) == (
        2, f"error: {tmp_path} is not a bundle: it has no manifest.json\n",
    )  # fmt: skip


def test_the_cpp_example(installed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    program = built("cpp_chat", installed, tmp_path / "cpp")
    done = subprocess.run([program, tiny_bundle, RUNTIME], input=PROMPT, capture_output=True, text=True, check=True)
    first = PROMPT.splitlines()[0]
    expected = call(tiny_bundle, "--prompt", first, "--temperature", 0, "--max-new-tokens", 200)
    assert done.stdout.startswith("> " + expected.rstrip("\n"))


@pytest.mark.skipif(not ARM.exists(), reason="needs `make aarch64`: g++-aarch64-linux-gnu and qemu-user")
def test_on_arm(tiny_executorch: Path, tmp_path: Path) -> None:
    """The unit tests and an ExecuTorch program on emulated 64-bit ARM: x86-64's tokens, and a state goes on here."""
    emulator = [shutil.which("qemu-aarch64") or "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
    assert run(*emulator, ARM.with_name("liger-unit")) == "every check passed\n"
    prompt = " ".join(map(str, Text(Bundle.open(tiny_executorch)).encode(PROMPT)))
    flags = ["--tokens", prompt, "--temperature", 0, "--print-ids", "--max-new-tokens"]
    expected = ids(call(tiny_executorch, *flags, 12))
    saved = tmp_path / "arm.state"
    assert ids(run(*emulator, ARM, tiny_executorch, *flags, 8, "--save-state", saved)) == expected[:8]
    rest = ["--temperature", 0, "--print-ids", "--load-state", saved, "--max-new-tokens", 3]
    assert ids(call(tiny_executorch, "--tokens", expected[8], *rest)) == expected[9:12]
