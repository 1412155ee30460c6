"""Files are written beside and renamed: an output is either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liger_deploy.errors import UserError


@contextlib.contextmanager
def staged_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory beside `out`; rename it to `out` on success, remove it on any error.

    Raises:
        UserError: `out` exists, its parent cannot be written, or the disk is full.
    """
    target = Path(out)
    with _disk_errors(target):
        if target.exists():
            raise UserError(f"{target} already exists: give another --out, or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield stage
            stage.chmod(0o755)
            stage.rename(target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def staged_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it onto `path` on success, remove it on any error.

    Raises:
        UserError: the directory cannot be written, or the disk is full.
    """
    target = Path(path)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        stage = Path(name)
        try:
            yield stage
            stage.chmod(0o644)
            stage.replace(target)
        finally:
            stage.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left on the disk of {target}: free some, or write elsewhere") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{target} came into being meanwhile: another process writes there too") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM):
            raise UserError(f"cannot write {target}: {error.strerror}") from error
        raise


def read_json(path: str | os.PathLike[str], error: type[UserError] = UserError) -> dict[str, Any]:
    """Read a JSON object. Raises `error` naming the file when it is missing, not JSON, or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as problem:
        raise error(f"{path} is not readable JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all."""
    with staged_file(path) as stage:
        stage.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
