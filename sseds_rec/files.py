"""Files: read from wherever iopath knows the way to, written whole or not at all."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from iopath.common.file_io import g_pathmgr

from sseds_rec.errors import UserError


def open_file(path: str | Path) -> IO[bytes]:
    """Opens a file for reading bytes: local, or of a store whose handler is registered with iopath's `g_pathmgr`."""
    return g_pathmgr.open(check_store(path), "rb")


def join(folder: str | Path, *names: str) -> str:
    """A path below a folder. (A `Path` would turn `store://bucket` into `store:/bucket`.)"""
    return os.path.join(str(folder), *names)


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder of this path."""
    return g_pathmgr.exists(check_store(path))


def check_store(path: str | Path) -> str:
    """The path, if it is local or of a store that iopath knows.

    Raises:
        UserError: iopath would take it for a strange local one.
    """
    known = tuple(g_pathmgr._path_handlers)
    if not is_local(path) and not str(path).startswith(known):
        raise UserError(f"{path}: no such store is registered with iopath; set SSEDS_STORES to a module that does so")
    return str(path)


def register_stores() -> None:
    """Imports the modules that the environment variable `SSEDS_STORES` names; they register handlers with `g_pathmgr`.

    They are found as if Python ran in the current folder.

    Raises:
        UserError: one of them cannot be imported.
    """
    for module in filter(None, os.environ.get("SSEDS_STORES", "").split(",")):
        sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(module.strip())
        except Exception as error:  # whatever their code raises
            raise UserError(f"SSEDS_STORES={module.strip()}: cannot be imported ({error})") from None
        finally:
            sys.path.pop(0)


def is_local(path: str | Path) -> bool:
    """Whether the path is one of this machine's file system."""
    return "://" not in str(path)


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary sibling file, then renames it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Writes a UTF-8 text file atomically."""
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Writes indented JSON atomically."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
