"""The documents' complete examples run as they stand, and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sseds_rec as sr

ROOT = Path(__file__).parent.parent


def test_relative_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    links = [(d, link) for d in documents for link in re.findall(r"\]\(([^)#\s]+)", d.read_text()) if ":" not in link]
    assert len(links) > 10
    assert [f"{d.relative_to(ROOT)}: {link}" for d, link in links if not (d.parent / link).exists()] == []


@pytest.mark.parametrize("launcher", [["python"], ["torchrun", "--standalone", "--nproc-per-node", "2"]])
def test_integrate_example(tmp_path: Path, launcher: list[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/integrate.md").read_text(), flags=re.DOTALL)
    (tmp_path / "job.py").write_text(code)
    start = ["-m", "torch.distributed.run", *launcher[1:]] if launcher[0] == "torchrun" else []
    command = [sys.executable, *start, "job.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = sr.DimensionPlan.load(tmp_path / "plan.json")
    assert 0 < plan.reached["parameters"]["fraction"] <= 0.1
    assert str(plan.dims()) in done.stdout
