"""What the README says holds: its tables are the JSON's, its commands exist, its Python runs."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.render import PAGES, render
from liger_deploy.__main__ import VERBS, main
from liger_deploy.export import EMBEDDED
from liger_deploy.export.targets import TARGETS
from tests.conftest import TINY_BASE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [block for block in blocks("sh") if "liger-deploy" in block]


def test_tables_are_what_the_benchmarks_wrote() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert render(text) == text, page


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_own_checkpoint_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"text": README[i : i + 700]}) + "\n" for i in range(0, 4900, 700))
    )
    commands = COMMANDS[0]
    for line in commands.splitlines():
        name, verb, *arguments = shlex.split(line)
        assert name == "liger-deploy"
        assert verb in VERBS
        limit = ["--max-new-tokens", "5"] if verb == "generate" else []
        limit = ["--tokens", "5"] if verb == "verify" else limit
        limit = ["--max-tokens", "2000", "--max-length", "500"] if verb == "finetune" else limit
        limit = ["--max-tokens", "1000"] if verb == "evaluate" else limit
        assert main([verb, *(a.replace("path/to/llama", str(TINY_BASE)) for a in arguments), *limit]) == 0
    assert (tmp_path / "chat.safetensors").is_file()


@pytest.mark.parametrize("line", [line for block in COMMANDS[1:] for line in block.splitlines()])
def test_commands_of_the_targets_parse(line: str) -> None:
    """Every flag exists; the targets' own tests run them."""
    name, verb, *arguments = shlex.split(line, comments=True)
    assert name == "liger-deploy"
    parser = argparse.ArgumentParser()
    importlib.import_module(f"liger_deploy.{VERBS[verb][0]}").add_arguments(parser)
    assert getattr(parser.parse_args(arguments), "target", "onnx") in TARGETS


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code.replace('"llama-tuned"', repr(str(EMBEDDED))), "README.md", "exec"), {})
    assert (tmp_path / "chat.safetensors").is_file()


def test_embedded_model_is_small() -> None:
    assert sum(p.stat().st_size for p in EMBEDDED.parent.rglob("*") if p.is_file()) < 8_000_000
