"""The documentation builds without a warning, its links lead somewhere, and its runnable commands run."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from liger_deploy.__main__ import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "runtimes").glob("*/README.md"))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = sorted({
    line.split("  #")[0].strip()
    for text in TEXTS.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("liger-deploy ")
})  # fmt: skip


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "state-format" / "index.html").is_file()


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page]):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_are_there(page: str) -> None:
    for path in re.findall(
        r"`((?:liger_deploy|tests|benchmarks|examples|runtimes|export|docs)/[\w./]+\.\w+)`", TEXTS[page]
    ):
        assert (ROOT / path).exists() or (ROOT / "liger_deploy" / path).exists(), path


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    """Every verb and flag exists."""
    _, verb, *arguments = shlex.split(command)
    parser = argparse.ArgumentParser()
    importlib.import_module(f"liger_deploy.{VERBS[verb][0]}").add_arguments(parser)
    parser.parse_args(arguments)


def test_runnable_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [b for text in TEXTS.values() for b in re.findall(r"<!-- runnable -->\n```sh\n(.*?)```", text, re.DOTALL)]
    assert blocks
    for line in "".join(blocks).splitlines():
        name, *arguments = shlex.split(line)
        assert name == "liger-deploy"
        assert main(arguments) == 0, line
