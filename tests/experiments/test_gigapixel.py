"""The benchmark of very large images: its image is the same however it is read, and its report is complete."""

import json

import numpy as np
import pytest

from experiments.benchmarks.gigapixel import Mosaic, main
from luna_vision.images import open_image


def test_the_image_is_a_function_of_position():
    image = Mosaic(1100)
    whole = image[0:1100]
    assert np.array_equal(image[500:530], whole[500:530])
    assert np.array_equal(Mosaic(700)[0:700], whole[:700, :700])
    pieces = [whole[i : i + 512, j : j + 512].reshape(-1, 3) for i in (0, 512) for j in (0, 512)]
    assert len({piece[:1000].tobytes() for piece in pieces}) == 4
    assert all(piece.std(axis=0).min() > 5 for piece in pieces)


def test_the_report(tmp_path, capsys):
    words = ["--side", "600", "--ordinary-side", "256", "--check-side", "300", "--repeats", "1", "--device", "cpu"]
    words += ["--model", "test_luna_vit", "--tiff", str(tmp_path / "a.tif"), "--out", str(tmp_path / "out.json")]
    assert main(words) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert np.array_equal(open_image(tmp_path / "a.tif")[0:600], Mosaic(600)[0:600])
    assert report["streamed"]["patches"] == 38 * 38 and report["random_weights"] is True
    assert report["streamed"]["peak_resident_bytes"] > report["streamed"]["planned_bytes"]
    assert all(report["equality"][name] < 1e-4 for name in ("embedding", "logits", "memory"))
    assert "throughput, streamed over ordinary" in capsys.readouterr().out
    assert main([*words, "--classes", "3", "--tissue", "0.2"]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["equality"]["classes"] < 1e-3 and 0.15 < report["streamed"]["valid_patches"] / 38**2 < 0.3
    (tmp_path / "state.pt").write_bytes(b"")
    for wrong, message in ((["--side", "500"], "not that of --side 500"), (["--store", str(tmp_path)], "was stopped")):
        with pytest.raises(SystemExit) as exit_:
            main([*words, *wrong])
        assert exit_.value.code == 2 and message in capsys.readouterr().err
