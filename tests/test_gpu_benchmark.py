"""The script for a lent GPU goes through all its parts in toy sizes, and continues where it was stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
PARTS = ("maps", "agreement", "repeat", "small", "large", "kernels", "curvature")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_dry_run_measures_every_part_and_prints_one_table(tmp_path):
    done = run("--out", str(tmp_path), "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found) == set(PARTS)
    assert all(part["done"] for part in found.values())
    assert "7 of 7 parts are done" in done.stdout
    # Here both sides are CPUs.
    assert all(one["same bytes"] for one in found["maps"]["maps"].values())
    assert {name: far for name, far in found["agreement"]["methods"].items() if name != "train" and far != 0} == {}
    assert found["repeat"]["runs"]["float32"]["same bytes"]
    assert set(found["small"]["throughput"]["64"]) >= {"frozen", "tensorsketch:256"}
    # What is done is not done again; what was stopped is.
    kept = (tmp_path / "maps.json").stat().st_mtime_ns
    kernels = json.loads((tmp_path / "kernels.json").read_text()) | {"done": False}
    (tmp_path / "kernels.json").write_text(json.dumps(kernels))
    assert run("--out", str(tmp_path), "--dry-run").returncode == 0
    assert (tmp_path / "maps.json").stat().st_mtime_ns == kept
    assert json.loads((tmp_path / "kernels.json").read_text())["done"]
