"""The GPU check, dry-run on the CPU: it follows the package's interface, and tells right from wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.gpu import gpu_check
from luna_vision.execution import Encoded

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


def run(out: Path, *sections: str) -> tuple[int, dict]:
    code = gpu_check.main(["--device", "cpu", "--out", str(out), "--sections", *sections])
    return code, json.loads((out / "gpu_check.json").read_text())


def test_quick_sections_run_in_small(tmp_path):
    sections = ["machine", "execution", "waits", "kernel_speed", "profile", "training"]
    code, found = run(tmp_path, *sections)
    assert code == 0 and found["failed"] == []
    assert len(found["execution"]) == 7 and all(row["ok"] for row in found["execution"])
    assert "needs a GPU" in found["waits"][0]["skipped"] and "needs a GPU" in found["kernel_speed"][0]["skipped"]
    assert [row["ms_per_step"] > 0 for row in found["training"]] == [True] * 4
    assert (tmp_path / "profile_64_1.txt").stat().st_size
    assert {"cpu", "torch", "luna_vision"} <= set(found["machine"])


def test_a_later_check_keeps_the_other_sections(tmp_path):
    run(tmp_path, "machine", "waits")
    _, found = run(tmp_path, "waits")
    assert len(found["machine_speed"]) == len(found["waits"]) == 1


def test_what_is_wrong_is_said_and_hides_nothing(tmp_path, monkeypatch, capsys):
    def wrong(model, image, **arguments) -> Encoded:
        found = encode(model, image, **arguments)
        found.logits.mul_(torch.nan)
        return found

    def broken(model, rows) -> None:
        raise RuntimeError("no bands here")

    encode = gpu_check.encode
    monkeypatch.setattr(gpu_check, "encode", wrong)
    monkeypatch.setattr(gpu_check, "set_band_checkpointing", broken)
    code, found = run(tmp_path, "execution")
    assert code == 1 and len(found["failed"]) == 2
    assert {row["name"] for row in found["execution"] if not row["ok"]} == {"bands", "streaming"}
    assert sum(row["ok"] for row in found["execution"]) == 5
    assert "bands: RuntimeError: no bands here" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main(["--out", str(tmp_path)])
    assert exit_.value.code == 2 and "--device cpu is a dry run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_runs_everything_in_small(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # also where the environment is not activated
    environment = {**os.environ, "PATH": path, "DEVICE": "cpu", "OUT": str(tmp_path), "JOBS": "0"}
    words = ["bash", "experiments/gpu/gpu_check.sh", "-k", "test_auto_takes_the_form"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in (tmp_path / "pytest.log").read_text() and "0 failed" in (tmp_path / "check.log").read_text()
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(found["layer"]) == 8 * 4 * 6 and len(found["models"]) == 4 * 2 * len(gpu_check.VARIANTS[::5])
    assert all(row["ok"] for section in ("layer", "models") for row in found[section])
    if importlib.util.find_spec("triton"):
        assert [row["ok"] for row in found["kernels"]] == [True] * 2
    else:
        assert "not installed" in found["kernels"][0]["skipped"]
    assert len(found["speed"]) == 15 and not any("error" in row for row in found["speed"])
    assert {"machine_speed", "execution", "waits", "kernel_speed", "profile", "training"} <= set(found)
