"""The help of the training commands, short, and without what it takes to train."""

__all__ = ["short_help"]

_WHAT = {
    "fit": "Train a model and test its best checkpoint. Without --config, digits of scikit-learn in about a minute.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
    "predict": "Write the five most probable classes of images to a CSV file.",
}
_OWN = {
    "fit": """\
  --ckpt_path FILE            begin with a checkpoint, its optimizer included
  --test_after_fit false      leave out the test at the end
  --resume                    take up the newest run of this configuration that was stopped""",
    "predict": """\
  --data.predict_path PATH    an image file or a folder of them; by default the test images
  --out FILE                  .csv; by default predictions.csv in the run's own folder""",
}
_NEEDS = """\
  --ckpt_path FILE            the weights: runs/NAME/version_0/checkpoints/best.ckpt of a fit
  --model.checkpoint FILE     or a timm or .safetensors file"""


def short_help(words: list[str]) -> str:
    """The help of the training command that a command line asks for; empty if it asks for none, or for another one."""
    command = next((word for word in words if word in _WHAT), None)
    if command is None or not {"-h", "--help"} & set(words):
        return ""
    own = _OWN.get(command, "")
    if command != "fit":
        own = f"{_NEEDS}\n{own}".rstrip()
    return f"""\
usage: luna-vision {command} [--config FILE ...] [--OPTION VALUE ...]

{_WHAT[command]}

  --config FILE               a YAML file with all of a run; several are laid over each other
  --name NAME                 of the run, which writes into runs/NAME
  --data CLASS                what to read: DigitsDataModule, CIFAR10DataModule, ImageFolderDataModule, ...
  --data.root FOLDER          where the data is
  --data.img_size N           side of the images in pixels
  --data.batch_size N         images in a batch, on each device
  --model.model_name NAME     any of timm's models, such as luna_vit_tiny; --model CLASS is another task
  --model.lr RATE             peak learning rate
  --trainer.max_epochs N      passes over the training images
  --trainer.devices N         number of GPUs, or of processes on CPUs
{own}

all options:                  luna-vision {command} --help_all
those of a task or of data:   luna-vision {command} --model.help DetectionTask, --data.help ImageFolderDataModule
what would run, as YAML:      luna-vision {command} ... --print_config"""
