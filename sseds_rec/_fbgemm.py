"""Tells a broken installation of fbgemm, the kernels under TorchRec, in one line and before TorchRec fails on it.

The CPU build (distribution `fbgemm-gpu-cpu`) and the CUDA build (`fbgemm-gpu`) write the same folder, `fbgemm_gpu`, and
each release is compiled against one torch. A mixed or mismatched set shows itself as a page of undefined symbols.
"""

import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType, TracebackType

from sseds_rec.errors import UserError

TORCH = "2.13.0"
TORCHREC = FBGEMM = "1.8.0"  # of one release number, always
_FIX = (
    'run "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu", then '
    f'"pip install --no-deps torchrec=={TORCHREC} fbgemm-gpu-cpu=={FBGEMM}" (for a GPU: fbgemm-gpu=={FBGEMM})'
)


class InstallError(UserError, ImportError):
    """TorchRec's kernels are missing, mixed or mismatched; the message says what to run."""


def check_builds() -> None:
    """Looks at what is installed, without loading any of it.

    Raises:
        InstallError: One of torchrec and fbgemm is missing, both builds of fbgemm are installed, or its release is not
            torchrec's.
    """
    _raise_if(_build_problem())


def check_with_torchrec() -> None:
    """Has fbgemm loaded first when TorchRec is imported, by whatever module.

    That import raises `InstallError` if `check_builds` would, or fbgemm's libraries do not load.
    """
    if "torchrec" not in sys.modules and not any(isinstance(finder, _BeforeTorchRec) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchRec())


class _BeforeTorchRec(MetaPathFinder):
    """Finds no module, but is asked for each."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname != "torchrec":
            return
        sys.meta_path.remove(self)  # what follows looks for TorchRec too
        problem = _build_problem() or _load_problem()
        if problem:
            sys.meta_path.insert(0, self)  # another attempt fails alike
        _raise_if(problem)


def _raise_if(problem: str | None) -> None:
    if problem:
        _print_without_traceback()
        raise InstallError(f"{problem}; {_FIX}")


def _build_problem() -> str | None:
    builds = {name: v for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if (v := _version(name))}
    if len(builds) > 1:
        found = " and ".join(f"{name} {v}" for name, v in builds.items())
        return f"{found} are both installed and overwrite each other"
    # Not by distribution: a build from source may have another name.
    missing = [name for name in ("torchrec", "fbgemm_gpu") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    torchrec = _version("torchrec")
    for name, v in builds.items():
        if torchrec and v.split(".")[:2] != torchrec.split(".")[:2]:
            return f"{name} {v} does not belong to torchrec {torchrec}"
    return None


def _load_problem() -> str | None:
    import torch

    # fbgemm logs pages when it fails, and useful warnings when it does not: hold them until that is known.
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logging.root.addFilter(hold)
    try:
        import fbgemm_gpu  # noqa: F401

        torch.ops.fbgemm.asynchronous_complete_cumsum  # noqa: B018  an emptied folder imports, but brings no kernels
    except Exception as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        return f"fbgemm_gpu does not load with torch {torch.__version__} (made for {TORCH}): {reason}"
    finally:
        logging.root.removeFilter(hold)
    for record in held:
        logging.root.handle(record)
    return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _print_without_traceback() -> None:
    """Lets an uncaught InstallError end a script as its one line; every other exception is shown as before."""
    usual = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if kind is InstallError:
            print(f"sseds_rec: {error}", file=sys.stderr)
        else:
            usual(kind, error, traceback)

    sys.excepthook = show
