"""The weights that come with the package."""

import csv
from pathlib import Path

import pytest
import skimage.data
import timm
import torch
from PIL import Image

import luna_vision
from luna_vision.cli.main import main
from luna_vision.export.hub import training_details
from luna_vision.models.weights import SHIPPED, weights_file

NAME = "luna_vit_nano_patch8"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return timm.create_model(NAME, pretrained=True).eval()


def named(model, photo) -> str:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        label = model(transform(Image.fromarray(photo))[None]).argmax()
    return model.pretrained_cfg["label_names"][label]


def test_it_names_what_is_in_a_photo(model):
    assert named(model, skimage.data.coffee()) == "espresso"
    assert named(model, skimage.data.chelsea()) in ("Egyptian cat", "tabby", "Persian cat")


def test_the_configuration_says_what_it_is(model):
    cfg = model.pretrained_cfg
    assert (cfg["tag"], cfg["input_size"], cfg["num_classes"]) == ("tiny_imagenet_64", (3, 64, 64), 200)
    assert len(cfg["label_names"]) == 200 and "goldfish" in cfg["label_names"] and "teddy" in cfg["label_names"]
    with (ROOT / "docs/results/tiny_imagenet/metrics.csv").open() as file:
        tested = [float(row["test_acc1"]) for row in csv.DictReader(file) if row["test_acc1"]]
    assert f"top-1 {tested[-1]:.4f} on its test images" in cfg["notes"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"num_classes": 10}, (2, 10)),
        ({"num_classes": 0}, (2, 128)),
        ({"in_chans": 1}, (2, 200)),
        ({"img_size": 512}, (2, 200)),
        ({"global_pool": "avg", "num_classes": 10}, (2, 10)),
        ({"patch_size": 16}, (2, 200)),
    ],
    ids=str,
)
def test_timm_adapts_them(model, options, shape):
    adapted = timm.create_model(NAME, pretrained=True, **options).eval()
    torch.testing.assert_close(adapted.blocks[3].attn.pack_q.weight, model.blocks[3].attn.pack_q.weight)
    with torch.inference_mode():
        assert adapted(torch.randn(2, options.get("in_chans", 3), 64, 64)).shape == shape


def test_features(model):
    with torch.inference_mode():
        maps = timm.create_model(NAME, pretrained=True, features_only=True)(torch.randn(1, 3, 96, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [(128, 12, 8)] * 3


def test_they_are_small_and_load_as_a_training_does():
    file = weights_file(SHIPPED[0])
    assert file.stat().st_size < 4e6
    model, transform, names = luna_vision.load(file)
    with torch.inference_mode():
        assert names[model(transform(Image.fromarray(skimage.data.coffee()))[None]).argmax()] == "espresso"


def test_the_command_predicts_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(skimage.data.coffee()).save("coffee.png")
    monkeypatch.setattr("sys.argv", ["luna-vision", "predict", "coffee.png", "--out", "found.csv"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "espresso" in Path("found.csv").read_text()


def test_variants_without_weights_say_which_have_some():
    with pytest.raises(RuntimeError, match=SHIPPED[0]):
        timm.create_model("luna_vit_small", pretrained=True)


def test_the_model_card_says_what_they_were_trained_on():
    details = training_details(weights_file(SHIPPED[0]))
    assert "Tiny-ImageNet" in details["Notes"] and "top-1" in details["Notes"]
