"""Android's Kotlin and JNI on a desktop JVM: tokens, text, states and errors of LigerSession."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.programs import BUILD, ROOT, RUNTIME, call, ids
from tests.test_native_build import json_headers, run

KOTLIN = ROOT / "build" / "kotlin" / "run_kotlin_kernel" / "jars"
MODULE = ROOT / "runtimes" / "android" / "liger" / "src" / "main"
JAVAC = shutil.which("javac")


@pytest.mark.skipif(not JAVAC or not KOTLIN.exists(), reason="needs a JDK and `make kotlin`")
def test_kotlin_session(tiny_bundle: Path, tmp_path: Path) -> None:
    home = str(Path(str(JAVAC)).resolve().parents[1])
    cache = (BUILD / "CMakeCache.txt").read_text().splitlines()
    headers = next(line.split("=", 1)[1] for line in cache if line.startswith("ONNXRUNTIME_HEADERS:"))
    flags = [f"-DNLOHMANN_JSON={json_headers()}", f"-DONNXRUNTIME_HEADERS={headers}"]
    run("cmake", "-S", MODULE / "cpp", "-B", tmp_path / "jni", *flags, JAVA_HOME=home)
    run("cmake", "--build", tmp_path / "jni", "--target", "liger_jni", "liger_onnx")
    compiler = next(KOTLIN.glob("kotlin-jupyter-kernel-*-all.jar"))
    path = f"{next(KOTLIN.glob('kotlin-stdlib-*.jar'))}:{compiler}"
    sources = [MODULE / "kotlin" / "dev" / "liger" / "LigerSession.kt", ROOT / "tests" / "native" / "Main.kt"]
    kotlinc = ["java", "-cp", compiler, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib", "-no-reflect"]
    run(*kotlinc, "-cp", path, "-jvm-target", "17", "-Werror", "-d", tmp_path / "out", *sources)
    java = ["java", f"-Djava.library.path={tmp_path / 'jni'}", "-cp", f"{tmp_path / 'out'}:{path}", "MainKt"]
    state = tmp_path / "x.state"
    done = subprocess.run([*map(str, java), tiny_bundle, RUNTIME, state], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, following, stopped, *rest = done.stdout.split("\n", 3)
    flags = ["--temperature", "0", "--max-new-tokens"]
    assert ids(tokens) == ids(call(tiny_bundle, "--prompt", "def add(a, b):", "--print-ids", *flags, 40))
    again = [*flags, "20", "--load-state", state]
    assert ids(following) == ids(call(tiny_bundle, "--prompt", "x", "--print-ids", *again))
    assert stopped == "3"
    text, words = rest[0].split("\n--\n")
    assert text + "\n" == call(tiny_bundle, "--prompt", "def add(a, b):", *flags, 40)
    assert words.splitlines() == [
        "the prompt is empty: give it some text",
        "/no/bundle is not a bundle: it has no manifest.json",
        "this session is closed",
    ]
