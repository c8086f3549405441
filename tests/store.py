"""A remote store: `test://PATH`, which iopath finds in a local folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from iopath.common.file_io import PathHandler, g_pathmgr


class Store(PathHandler):
    """Finds `test://` in a folder, and remembers what was opened and written."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.opened, self.written = folder, list[str](), list[str]()

    def _get_supported_prefixes(self) -> list[str]:
        return ["test://"]

    def _local(self, path: str) -> Path:
        return self.folder / path.removeprefix("test://")

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> IO[Any]:
        self.opened.append(path)
        return open(self._local(path), mode, buffering)

    def _exists(self, path: str, **_: Any) -> bool:
        return self._local(path).exists()

    def _isdir(self, path: str, **_: Any) -> bool:
        return self._local(path).is_dir()

    def _isfile(self, path: str, **_: Any) -> bool:
        return self._local(path).is_file()

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self._local(path))

    def _mkdirs(self, path: str, **_: Any) -> None:
        self._local(path).mkdir(parents=True, exist_ok=True)

    def _copy_from_local(self, local_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> None:
        self.written.append(dst_path)
        shutil.copyfile(local_path, self._local(dst_path))

    def _rm(self, path: str, **_: Any) -> None:
        self._local(path).unlink()


@contextmanager
def registered(folder: Path) -> Iterator[Store]:
    """Makes `folder` the content of `test://` for a while."""
    store = Store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g_pathmgr, "_path_handlers", dict(g_pathmgr._path_handlers))
        g_pathmgr.register_handler(store, allow_override=True)
        yield store
