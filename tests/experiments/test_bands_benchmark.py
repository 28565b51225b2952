"""The benchmark of training steps in bands, on a small model."""

import json

import pytest
import timm

from experiments.benchmarks import bands

TINY = ["--model", "test_luna_vit,depth=1", "--side", "64", "--large-side", "96", "--rows", "2"]


@pytest.mark.slow
def test_command_measures_and_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bands.json"
    words = [*TINY, "--threads", "1", "--out", str(out)]
    assert bands.main([*words, "--ways", "plain", "bands"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["way"], row["side"], row["rows"]) for row in rows] == [
        ("plain", 64, 0),
        ("bands", 64, 2),
        ("bands", 96, 2),
    ]
    assert rows[0]["gradient_norm"] == pytest.approx(rows[1]["gradient_norm"], rel=1e-4)
    for row in rows:
        assert row["peak_resident_bytes"] >= row["resident_bytes_before"] > 10**7 and row["seconds"] > 0
    assert "96 px, bands: " in capsys.readouterr().out
    monkeypatch.setattr(bands.subprocess, "run", None)  # a second call has nothing to start
    assert bands.main([*words, "--ways", "plain", "bands"]) == 0


def test_bands_of_another_height_are_measured_too(tmp_path, monkeypatch):
    done = []
    measured = {"seconds": 1.0, "peak_resident_bytes": 1}
    monkeypatch.setattr(bands, "run_job", lambda job: done.append(job["way"]) or {**job, **measured})
    words = [*TINY[:-2], "--ways", "plain", "bands", "--out", str(tmp_path / "bands.json")]
    for rows, expected in ((2, ["plain", "bands", "bands"]), (2, []), (3, ["bands", "bands"])):
        done.clear()
        assert bands.main([*words, "--rows", str(rows)]) == 0
        assert done == expected


@pytest.mark.slow
def test_a_step_that_fails_is_a_row_and_exit_code_1(capsys):
    assert bands.main(["--model", "test_luna_vit,proj_drop_rate=0.1", *TINY[2:], "--ways", "bands"]) == 1
    assert "64 px, bands: ValueError: bands need attn_drop_rate=0" in capsys.readouterr().out


def test_estimate_counts_what_is_kept():
    model = timm.create_model("luna_vit_small", device="meta")
    float32, bfloat16 = (bands.estimate(model, 8192, size) for size in (4, 2))
    assert float32 - bfloat16 == 12 * 512 * 512 * 384 * 2
    assert bfloat16 < 8e9


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out", "x.txt"], "--out must end in .json"),
        (["--model", "vit_tiny_patch16_224"], "must be a Luna ViT, which has bands, got vit_tiny"),
        (["--model", "test_luna_vit,depth"], "arguments are name=value, got 'depth'"),
    ],
)
def test_wrong_arguments_are_said(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bands.main([*TINY, *words])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
