"""Detection and segmentation beside peers: every variant trains two batches of small scenes, and its result is kept."""

import json

import pytest

from experiments.benchmarks import own_labels
from experiments.runs import Run
from luna_vision.utils.files import write_json
from tests.labelled import NAMES, SPLITS, write_masks, write_voc

pytestmark = pytest.mark.filterwarnings("ignore")


def shrink(run: Run) -> Run:
    """The same run on scenes of `tests.labelled`, for two epochs of one batch."""
    recipe = run.config["recipe"]
    recipe["model"]["init_args"]["model_kwargs"] |= {"embed_dim": 16, "depth": 1, "num_heads": 1}
    recipe["trainer"] |= {"limit_train_batches": 1, "max_epochs": 2, "check_val_every_n_epoch": 1}
    data = recipe["data"]["init_args"] | {"batch_size": 2}
    if run.task == "bccd":
        data |= {"class_names": NAMES}
    else:
        data |= {"classes": ["background", *NAMES], "crop_size": 32, "background": True}
    recipe["data"]["init_args"] = data
    return run


@pytest.mark.slow
@pytest.mark.parametrize("task", own_labels.VARIANTS)
def test_every_variant_trains_and_is_tested(task, tmp_path):
    write = write_voc if task == "bccd" else write_masks
    write(tmp_path / task)
    runs = own_labels.plan(own_labels._parser().parse_args(["--tasks", task]))
    assert [run.variant for run in runs] == list(own_labels.VARIANTS[task])
    for run in map(shrink, runs[1:3]):
        result = own_labels.execute(run, str(tmp_path), tmp_path / "work" / run.work_name)
        assert result["steps"] == 2 and len(result["validation"]) == 2 and result["seconds"] > 0
        assert 0 <= result["test_map" if task == "bccd" else "test_miou"] <= 1
        assert (tmp_path / "work" / run.work_name / "report/report.html").is_file()
        write_json(tmp_path / "runs" / f"{run.name}.json", {"task": task, "variant": run.variant, "seed": 0, **result})
    text = own_labels.write_report(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert set(written) == {run.name for run in runs[1:3]} and all(name in text for name in written)
    assert len({row["parameters"] for row in written.values()}) > 1 and SPLITS["test"] > 0


def test_the_runs_of_a_task_differ_in_their_model_alone():
    for task in own_labels.VARIANTS:
        runs = own_labels.plan(own_labels._parser().parse_args(["--tasks", task, "--seeds", "0", "1", "--epochs", "3"]))
        assert len({run.work_name for run in runs}) == len(runs)
        for run in runs:
            run.config["recipe"].pop("model"), run.config["overlays"].pop(0)
        assert len({json.dumps(run.config) for run in runs}) == 2
