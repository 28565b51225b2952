"""The short help of the training commands, which needs no torch."""

__all__ = ["TRAINING", "short_help"]

TRAINING = {
    "fit": "Train a model and test its best checkpoint. Without --config, a small one on the digits of scikit-learn.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
    "predict": "Write predictions to files: classes as CSV, boxes as COCO JSON, masks as PNG, maps of large images.",
}
_OWN = {
    "fit": """\
  --ckpt_path FILE            start from a checkpoint, with its optimizer
  --test_after_fit false      skip the test at the end
  --resume                    continue the newest stopped run of this configuration""",
    "predict": """\
  PATH ... [--checkpoint FILE]  images or folders, and best.safetensors or best.ckpt of any training, in place of
                              --config, --ckpt_path and --data.predict_path
  --data.predict_path PATH    an image file or a folder of them; by default the test images
  --out FILE                  .csv, .json of boxes, or a folder of masks; by default in a new folder of runs/
  PATH --out FILE.tif|.zarr|.geojson  a map of the classes, or the objects, of one image of any size;
                              --out x.tif --help lists the options
  --overlays FOLDER           also draw the boxes or masks that were found over the images
  --overwrite                 replace files that exist, which is refused otherwise
  --dtype TYPE                float32, bfloat16 or float16; by default bfloat16 on a GPU that has it, else float32""",
}
_PHOTOS = """
On photos of your own: luna-vision fit --config configs/image_folder.yaml --data.root photos"""
_NEEDS = """\
  --ckpt_path FILE            the weights: runs/NAME/version_0/checkpoints/best.ckpt of a fit
  --model.checkpoint FILE     or a timm or .safetensors file"""


def short_help(words: list[str]) -> str:
    """The help of the training command in a command line with --help; else empty."""
    command = next((word for word in words if word in TRAINING), None)
    if command is None or not {"-h", "--help"} & set(words):
        return ""
    own = _OWN.get(command, "")
    if command != "fit":
        own = f"{_NEEDS}\n{own}".rstrip()
    return f"""\
usage: luna-vision {command} [--config FILE ...] [--OPTION VALUE ...]

{TRAINING[command]}{_PHOTOS if command == "fit" else ""}

  --config FILE               a YAML file with all of a run; later ones replace parts of it
  --name NAME                 name of the run, which writes into runs/NAME
  --data CLASS                the data: DigitsDataModule, CIFAR10DataModule, ImageFolderDataModule, ...
  --data.root FOLDER          folder of the data
  --data.img_size N           side of the images in pixels
  --data.batch_size N         images in a batch, on each device
  --model.model_name NAME     any of timm's models, such as luna_vit_tiny; --model CLASS is another task
  --model.lr RATE             peak learning rate, in place of that of the config
  --trainer.max_epochs N      passes over the training images
  --trainer.devices N         number of GPUs, or of processes on CPUs
{own}

all options:                  luna-vision {command} --help_all
those of a task or of data:   luna-vision {command} --model.help DetectionTask, --data.help ImageFolderDataModule
what would run, as YAML:      luna-vision {command} ... --print_config"""
