"""A model card says what a checkpoint says, as text and nothing more."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt

from luna_vision import export
from luna_vision.cli.export import main

HOSTILE = [
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example",
    "`</code><img src=x onerror=alert(1)>`",
    "a``b`c ```d",
    "\n---\nlicense: mit\n---\n# Another card\n",
    "x\n\n- **Licence:** mit\n",
    "$$\\href{https://evil.example}{x}$$ :smile: @user #1 &lt; **bold** _it_",
    "\x1b]0;owned\x07",
]
NAME = "test_luna_vit"
ARGS = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 8}


def card_of(text: str, folder: Path) -> str:
    """Of a checkpoint that has a text wherever it may have one."""
    model = {"model_name": NAME, "num_classes": 2, "in_chans": 3, "model_kwargs": ARGS}
    cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "label_names": [text, f"{text} 2"], "num_classes": 2}
    cfg |= {"license": text, "architecture": text, "url": text, "hf_hub_id": text, "paper_name": text, text: text}
    task = {**model, "optimizer": text, "lr": 0.1, "weight_decay": 0.0, "init_from_vit": text, "checkpoint": text}
    state = {"monitor": text, "current_score": torch.tensor(0.5)}
    weights = timm.create_model(NAME, num_classes=2, **ARGS).state_dict()
    checkpoint = {"state_dict": weights, "hyper_parameters": task, "data": {"name": text, "cfg": cfg}}
    checkpoint |= {"epoch": 0, "global_step": 3, "callbacks": {"ModelCheckpoint{}": state}}
    torch.save(checkpoint, folder / "a.ckpt")
    main(["--checkpoint", str(folder / "a.ckpt"), "--format", "hf", "--out", str(folder / "it")])
    return (folder / "it" / "README.md").read_text(encoding="utf-8")


def structure(card: str) -> list[str]:
    """What a card is made of, without its words and the text of code."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card.split("---\n", 2)[2])
    parts = [child for token in tokens for child in (token.children or [token])]
    return [f"{part.type} {part.attrs}" for part in parts if part.type != "text"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_checkpoint_is_text(text, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "hostile").mkdir()
    plain, card = card_of("adamw", tmp_path / "plain"), card_of(text, tmp_path / "hostile")
    header = card.split("---\n", 2)[1]
    assert header == plain.split("---\n", 2)[1] and yaml.safe_load(header)["license"] == "apache-2.0"
    assert structure(card) == structure(plain)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", card.split("## Model Usage")[0])
    assert "evil" not in outside and "<" not in outside and "\x1b" not in card
    config = json.loads((tmp_path / "hostile" / "it" / "config.json").read_text())
    about = config["pretrained_cfg"]
    assert about["label_names"] == [text, f"{text} 2"]
    assert config["architecture"] == NAME and text not in about and text not in (about.get("url"), about["license"])


def test_the_license_of_a_folder_is_one_word(tmp_path):
    model = timm.create_model(NAME, **ARGS)
    model.pretrained_cfg = model.pretrained_cfg | {"license": "mit\ntags: [x]"}
    export.save_for_hf(model, tmp_path / "it")
    card = (tmp_path / "it" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n", 2)[1])
    assert header["license"] == "other" and header["tags"] == ["image-classification", "timm", "luna"]


def test_a_number_that_is_none_is_a_mistake(tmp_path):
    model = {"model_name": NAME, "num_classes": 2, "in_chans": 3, "model_kwargs": ARGS}
    weights = timm.create_model(NAME, num_classes=2, **ARGS).state_dict()
    task = {**model, "optimizer": "adamw", "lr": "# fast", "weight_decay": 0.0}
    torch.save({"state_dict": weights, "hyper_parameters": task}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="# fast"):
        main(["--checkpoint", str(tmp_path / "a.ckpt"), "--format", "hf", "--out", str(tmp_path / "it")])
