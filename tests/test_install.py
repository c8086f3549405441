"""A broken installation says so in one line: real interpreters on doctored search paths."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from sseds_rec import _fbgemm

ROOT = Path(__file__).parents[1]


def import_sseds_rec(site: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Imports the package in a new process that finds what is in `site` before anything installed."""
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    command = [sys.executable, *flags, "-c", "from sseds_rec import score_dimensions"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=site, timeout=120)


def add_distribution(site: Path, name: str, release: str) -> None:
    info = site / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The only line printed, which every failure ends with what to run."""
    assert result.returncode == 1
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith("sseds_rec: ")
    assert 'run "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu", then "pip install --no-deps torchrec==' in line
    return line


def installed_build() -> str:
    try:
        version("fbgemm-gpu-cpu")
    except PackageNotFoundError:
        return "fbgemm-gpu"
    return "fbgemm-gpu-cpu"


def test_a_sound_installation_imports_without_a_word(tmp_path: Path) -> None:
    result = import_sseds_rec(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_both_builds_of_fbgemm(tmp_path: Path) -> None:
    add_distribution(tmp_path, "fbgemm-gpu", "1.9.0")
    add_distribution(tmp_path, "fbgemm-gpu-cpu", "1.8.0")
    line = one_line(import_sseds_rec(tmp_path))
    assert "fbgemm-gpu 1.9.0 and fbgemm-gpu-cpu 1.8.0 are both installed" in line


def test_no_fbgemm(tmp_path: Path) -> None:
    (tmp_path / "torchrec").mkdir()
    (tmp_path / "torchrec" / "__init__.py").touch()
    assert "sseds_rec: fbgemm_gpu not installed" in one_line(import_sseds_rec(tmp_path, "-S"))


def test_neither_torchrec_nor_fbgemm(tmp_path: Path) -> None:
    assert "sseds_rec: torchrec and fbgemm_gpu not installed" in one_line(import_sseds_rec(tmp_path, "-S"))


def test_fbgemm_of_another_release(tmp_path: Path) -> None:
    build = installed_build()
    add_distribution(tmp_path, build, "1.7.0")
    line = one_line(import_sseds_rec(tmp_path))
    assert f"{build} 1.7.0 does not belong to torchrec {version('torchrec')}" in line


def test_fbgemm_whose_libraries_do_not_load(tmp_path: Path) -> None:
    spec = find_spec("fbgemm_gpu")
    assert spec is not None and spec.origin is not None
    broken = tmp_path / "fbgemm_gpu"
    broken.mkdir()
    for file in Path(spec.origin).parent.iterdir():
        if file.suffix == ".so":
            (broken / file.name).write_bytes(b"compiled for something else")
        else:
            (broken / file.name).symlink_to(file)
    line = one_line(import_sseds_rec(tmp_path))
    assert f"fbgemm_gpu does not load with torch {version('torch')} (made for 2.13.0)" in line
    assert ".so" in line


def test_fbgemm_folder_without_kernels(tmp_path: Path) -> None:
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").touch()
    assert "fbgemm_gpu does not load" in one_line(import_sseds_rec(tmp_path))


def test_the_module_run_as_a_program_prints_the_same_line(tmp_path: Path) -> None:
    add_distribution(tmp_path, "fbgemm-gpu", "1.9.0")
    add_distribution(tmp_path, "fbgemm-gpu-cpu", "1.8.0")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "sseds_rec", "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert "are both installed" in one_line(result)


@pytest.mark.parametrize(
    "pin", [f"torch=={_fbgemm.TORCH}", f"torchrec=={_fbgemm.TORCHREC}", f"fbgemm-gpu-cpu=={_fbgemm.FBGEMM}"]
)
def test_the_advice_names_the_declared_versions(pin: str) -> None:
    declared = [re.sub(r"[ ;].*", "", requirement) for requirement in requires("sseds-rec") or []]
    assert pin in declared


def test_constraints_pin_every_requirement_and_name_no_index() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pinned = {line.partition("==")[0] for line in text.splitlines() if not line.startswith("#")}
    wanted = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requires("sseds-rec") or []}
    assert wanted - pinned == {"sseds-rec"}
    assert "://" not in text and "--" not in text
