"""``luna-vision {fit,validate,test,predict}`` and ``python train.py ...``: a LightningCLI.

Exit codes: 0 success, 2 a mistake of the user (one line on stderr), 130 Ctrl-C, 143 SIGTERM, 1 any other error, with
its traceback.
``LUNA_VISION_TRACEBACK=1`` in the environment also shows the traceback of a mistake.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..models.factory import training_checkpoint
from ..tasks.base import TimmTask
from ..tasks.callbacks import check_tools
from ..tasks.checkpoints import AtomicCheckpointIO, best_checkpoint, check_checkpoint
from ..tasks.reporting import ExportBest, ModelSize, PredictionWriter, relative
from ..tasks.resume import ExactResume, resume, take_tuned
from ..tasks.sharding import FSDP2Strategy
from ..tasks.stopping import StopTogether
from ..utils.device import allow_tf32, pick_dtype
from ..utils.errors import UserError, arguments_of, is_check, one_line
from ..utils.files import check_folder
from ..utils.text import printable
from .common import DTYPE_HELP, DTYPES, WRAPPERS, Hints, run_command
from .predict_words import with_weights
from .training_help import short_help

SUBCOMMANDS = ("fit", "validate", "test", "predict")
# Lightning's names of autocast to a type
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
DIGITS = Path(__file__).with_name("digits.yaml")  # the config of a fit without --config
# by default; "trainer.callbacks+" adds to them, or replaces one of the same class
CALLBACKS = [
    "lightning.pytorch.callbacks.RichProgressBar",
    "luna_vision.tasks.ImagesPerSecond",
    "luna_vision.tasks.EpochLines",
    "luna_vision.tasks.NonFiniteGuard",
    "luna_vision.tasks.BestCheckpoint",
    "luna_vision.tasks.LastCheckpoint",
    "luna_vision.tasks.ExportBest",
    "luna_vision.tasks.PredictionWriter",
]


# the default of Lightning's Timer is an enum, which jsonargparse could not write into a config.yaml
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
# jsonargparse reads 1e5 as a number, PyYAML does not: a folder of that name gets its quotes
WHOLE_WITH_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
yaml.SafeDumper.add_implicit_resolver("tag:yaml.org,2002:float", WHOLE_WITH_EXPONENT, list("-+0123456789"))


class _Parser(Hints, LightningArgumentParser):
    elsewhere = {
        "batch": "data.batch_size",
        "batch_size": "data.batch_size",
        "device": "trainer.accelerator",
        "devices": "trainer.devices",
        "epoch": "trainer.max_epochs",
        "epochs": "trainer.max_epochs",
        "img_size": "data.img_size",
        "imgsz": "data.img_size",
        "learning_rate": "model.lr",
        "lr": "model.lr",
        "seed": "seed_everything",
        "weight_decay": "model.weight_decay",
        "workers": "data.num_workers",
    }

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Also dump arguments that were given although the data could supply them."""
        return super().dump(*args, **{"skip_link_targets": False} | kwargs)


class LunaCLI(LightningCLI):
    """LightningCLI for the tasks of this package and any of the data modules.

    The data supplies ``num_classes``, ``in_chans``, ``img_size`` and ``background`` of the task.

    ``fit --resume`` continues the newest unfinished run of the same configuration. So does a ``fit`` that SLURM
    requeued or torchrun restarted. After ``fit`` the best checkpoint is tested, unless ``--test_after_fit false``.
    ``--ckpt_path`` loads weights and, for ``fit``, the state of the optimizer. Hyperparameters always come from the
    configuration, never from the checkpoint.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--test_after_fit", type=bool, default=True, help="Test the best checkpoint after fit.")
        help_ = "Let fit continue the newest unfinished run of this configuration."
        parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=help_)
        parser.add_argument("--name", type=str, default="run", help="Of the run, which writes into runs/NAME.")
        parser.set_defaults(
            {
                "model": {"class_path": "luna_vision.tasks.ClassificationTask"},
                "trainer.callbacks": [{"class_path": path} for path in CALLBACKS],
            }
        )
        for name in ("num_classes", "in_chans", "img_size", "background"):
            value = partial(self._model_argument, name)
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=value, apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--out",
                type=str,
                help="The file, .csv or .json by the task, or the folder of masks; by default in a new folder of runs.",
            )
            help_ = "A folder for pictures of the images with the boxes or masks that were found."
            parser.add_argument("--overlays", type=str, help=help_)
            help_ = "Replace the files that --out and --overlays name, which is refused otherwise."
            parser.add_argument("--overwrite", type=bool, nargs="?", const=True, default=False, help=help_)
            parser.add_argument("--dtype", type=Literal[DTYPES], default="auto", help=f"The {DTYPE_HELP}.")
        return parser

    def _model_argument(self, name: str, data: LightningDataModule) -> Any:
        """An argument of the task: the given value, else the data's."""
        arguments = self._get(self.config, "model").get("init_args", {})
        if arguments.get(name) is not None:
            return arguments[name]
        try:
            value = getattr(data, name, None)
        except FileNotFoundError:  # no training folder, whose subfolders are the classes, as for prediction
            path = self._get(self.config, "ckpt_path") or arguments.get("checkpoint")
            value = training_checkpoint(path).get("hyper_parameters", {}).get(name) if path else None
        if name == "img_size" and value is not None:
            value = value[0] if value[0] == value[1] else list(value)
        return value

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with arguments_of("the configuration cannot be read"):
            super().parse_arguments(parser, args)

    def _set_seed(self) -> None:
        with arguments_of("seed_everything"):
            super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse a section that is none, and null where the type does not allow it: jsonargparse accepts both."""
        for section in ("model", "data", "trainer"):
            value = self._get(self.config, section)
            if not isinstance(value, Namespace):
                raise UserError(f"{section} must be a section of options, got {json.dumps(value)}")
        for section in ("model", "data"):
            spec = self._get(self.config, section)
            given = spec.get("init_args", {})
            module, _, name = spec["class_path"].rpartition(".")
            for cls in getattr(import_module(module), name).__mro__:
                for name, kind in get_type_hints(cls.__init__).items() if "__init__" in vars(cls) else ():
                    if given.get(name, kind) is None and kind is not Any and type(None) not in get_args(kind):
                        raise UserError(f"{section}.{name} must not be null")

    def instantiate_classes(self) -> None:
        """Raise a constructor's own error, which jsonargparse wraps in a list of all types that the value may have."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raised: BaseException = error
            while raised.__cause__ is not None and str(raised).startswith(WRAPPERS):
                raised = raised.__cause__
            if isinstance(raised, ModuleNotFoundError):  # a logger without its package, for instance
                raise UserError(f"the configuration needs a package: {one_line(raised)}") from raised
            if isinstance(raised, ValueError) and not is_check(raised):  # a library about its arguments
                raise UserError(f"the configuration does not fit: {one_line(raised)}") from raised
            raised.__suppress_context__ = True
            raise raised  # noqa: B904 (it keeps its own cause)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what exact resume needs: atomic checkpoints with all of the state."""
        config = self._get(self.config_init, "trainer")
        self._name_run(config)
        self._choose_precision(config)
        config["callbacks"] = self._callbacks(config)
        summary = config["enable_model_summary"]
        with arguments_of("trainer"):
            trainer = super().instantiate_trainer(enable_model_summary=False, **kwargs)
        if summary is not False:
            trainer.callbacks.append(ModelSize())
        if type(trainer.strategy).load_checkpoint not in (Strategy.load_checkpoint, FSDP2Strategy.load_checkpoint):
            name = type(trainer.strategy).__name__
            raise ValueError(f"{name} reads checkpoints itself, and unpickles what it finds: use fsdp2 or ddp")
        if isinstance(trainer.strategy.checkpoint_io, TorchCheckpointIO):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.subcommand == "fit":
            trainer.callbacks.insert(0, ExactResume(self._configuration()))
            # after the callbacks that write checkpoints, so that a due checkpoint is written before the run stops
            trainer.callbacks.append(StopTogether())
        return trainer

    def _name_run(self, config: Any) -> None:
        """Write to runs/NAME, unless the trainer's own options say otherwise."""
        name = self._get(self.config, "name")
        if config["default_root_dir"] is None:
            config["default_root_dir"] = f"runs/{name}"
        if self.subcommand == "predict" and self._get(self.config, "out"):
            # the file is all that there is to keep
            config["logger"], self.save_config_callback = False, None
        if config["logger"] is None:
            config["logger"] = [CSVLogger("runs", name), TensorBoardLogger(f"runs/{name}", "tensorboard")]

    def _choose_precision(self, config: Any) -> None:
        """Predict in the type of --dtype, or of the configuration's trainer.precision if that is auto, and have float32
        mean float32 where nothing is in half precision."""
        if self.subcommand == "predict":
            name = self._get(self.config, "dtype")
            if config["precision"] is None or name != "auto":
                gpu = torch.cuda.is_available() and config["accelerator"] in ("auto", "gpu", "cuda")
                dtype = str(pick_dtype(name, torch.device("cuda" if gpu else "cpu"))).removeprefix("torch.")
                config["precision"] = PRECISIONS[dtype]
                rank_zero_info(f"predicting in {dtype}")
        allow_tf32("16" in str(config["precision"]))

    def _callbacks(self, config: Any) -> list[Callback]:
        """The callbacks of the configuration: the last one of a standard class, and none that the trainer turns off."""
        unwanted = [ProgressBar] if config["enable_progress_bar"] is False else []
        unwanted += [Checkpoint, ExportBest] if config["enable_checkpointing"] is False else []
        given = config["callbacks"] or []
        callbacks = [c for c in (given if isinstance(given, list) else [given]) if not isinstance(c, tuple(unwanted))]
        out, overlays, overwrite = (
            self._get(self.config, name) if self.subcommand == "predict" else None
            for name in ("out", "overlays", "overwrite")
        )
        if out:
            self._get(self.config_init, "model").predictions.check(Path(out), overwrite)
        if overlays:
            check_folder(Path(overlays))
        if out or overlays:
            callbacks.append(PredictionWriter(out, overlays, overwrite))
        standard = {path.rpartition(".")[2] for path in CALLBACKS} | {"Report"}  # `luna-vision report` gives another
        names = [ProgressBar if isinstance(c, ProgressBar) else type(c).__name__ for c in callbacks]
        last = dict(zip(names, callbacks, strict=True))
        return [c for c, n in zip(callbacks, names, strict=True) if c is last[n] or n not in {*standard, ProgressBar}]

    def _configuration(self) -> dict[str, Any]:
        config = self.config[self.subcommand].clone()
        for name in ("config", "ckpt_path", "resume"):
            config.pop(name, None)
        content = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
        return json.loads(json.dumps(content, default=str))  # equal to what run.json gives back

    def _parse_ckpt_path(self) -> None:
        # The base class would let the checkpoint's hyperparameters silently replace the given ones.
        pass

    def check_run(self) -> None:
        """Find mistakes before the loggers create the run's folder."""
        path, checkpoint = self._get(self.config, "ckpt_path"), {}
        if path and path not in ("best", "last", "hpc"):
            if not Path(path).exists():
                raise FileNotFoundError(f"--ckpt_path: there is no file {path}")
            checkpoint = check_checkpoint(path)
        if self.subcommand != "fit" and not path:
            path = self.model.hparams.checkpoint
            if not path:
                raise ValueError(
                    f"{self.subcommand} needs weights: give --ckpt_path (or --model.checkpoint for a timm file)"
                )
            checkpoint = training_checkpoint(Path(path))
        for name in ("limit_train_batches", "max_steps"):
            if self.subcommand == "fit" and not getattr(self.trainer, name):
                raise ValueError(f"{name} is 0: there is nothing to train")
        self.model.check_start(optimizer=self.subcommand == "fit")
        if self.datamodule is not None and self.trainer.world_size == 1:
            self.datamodule.prepare_data()
            self.datamodule.setup(self.subcommand)
            self.model.check_data(self.datamodule, self.subcommand)
            self.model.check_classes(checkpoint, self.datamodule, str(path))
            if self.subcommand == "fit" and self._tests():
                self.datamodule.setup("test")  # find its mistakes now, not after the training
        if self.subcommand == "fit":
            resumed = resume(self.trainer, self._configuration(), self._get(self.config, "resume"))
            check_tools(self.trainer, self.model, resumed is not None)
            self.config[self.subcommand]["resume"] = False  # the run's config.yaml is for new runs
            if resumed:
                self.config_init[self.subcommand]["ckpt_path"] = resumed
            if start := resumed or path:
                take_tuned(self.trainer, self.model, self.datamodule, start)

    before_fit = before_validate = before_test = before_predict = check_run

    def after_predict(self) -> None:
        if any(isinstance(callback, PredictionWriter) and callback.unread for callback in self.trainer.callbacks):
            sys.exit(1)

    def _tests(self) -> bool:
        """Whether the best weights are tested after fit: a data module of the user's own may have no test images."""
        return self._get(self.config, "test_after_fit") and is_overridden("test_dataloader", self.datamodule)

    def after_fit(self) -> None:
        best = best_checkpoint(self.trainer)
        if best and self._tests():
            # an empty list if there are no test images
            for metrics in self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, weights_only=True):
                if self.trainer.is_global_zero:
                    name, called = self.model.headline
                    print(f"{called + ':':<16} {metrics[name]:.4f} with {printable(relative(best))}")
        for callback in self.trainer.callbacks:
            if isinstance(callback, ExportBest):
                callback.announce()
            elif isinstance(callback, ExactResume):
                callback.note(finished=True)


def build(args: list[str] | None = None, run: bool = True) -> LunaCLI:
    """Build task, data and trainer, and run the subcommand. Errors are raised.

    Args:
        args: the words of the command line; by default those of this process.
        run: False only builds, and takes no subcommand.
    """
    strict = {"exit_on_error": False, "allow_abbrev": False}
    return LunaCLI(
        TimmTask,
        LightningDataModule,
        parser_class=_Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        # Errors reach main() as exceptions; jsonargparse would print its usage and exit.
        parser_kwargs={**strict, **{name: dict(strict) for name in SUBCOMMANDS if run}},
        args=args,
        run=run,
    )


def with_default_config(args: list[str]) -> list[str]:
    """Insert the config of the digits after ``fit`` unless there is a --config.

    Raises:
        UserError: Other data are named without a --config: what suits small grey digits would not suit them.
    """
    names = [arg.partition("=")[0] for arg in args]
    if "fit" not in args or {"-c", "--config"} & set(names):
        return args
    if own := {"--data", "--data.class_path", "--data.root"} & set(names):
        raise UserError(
            f"{min(own)} needs a --config, such as configs/image_folder.yaml for photos of your own: without one, fit "
            "trains a small model on digits"
        )
    position = args.index("fit") + 1
    return [*args[:position], "--config", str(DIGITS), *args[position:]]


def with_arguments_of_the_name(args: list[str]) -> list[str]:
    """Empty ``model_kwargs`` where a word names another model than the last --config, and none gives its arguments."""
    given = dict(pairwise(args)) | dict(arg.split("=", 1) for arg in args if "=" in arg)
    name = given.get("--model.model_name") or given.get("--model.init_args.model_name")
    if "fit" not in args or name is None or any(".model_kwargs" in arg for arg in args):
        return args
    try:
        model = yaml.safe_load(Path(given.get("--config") or given["-c"]).read_text("utf-8"))["model"]
        model = model.get("init_args", model)
        if model["model_name"] == name or not model.get("model_kwargs"):
            return args
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return args  # whoever reads it says what is wrong
    rank_zero_info(f"the model_kwargs of the --config are for {model['model_name']}, and are left out for {name}")
    return [*args, "--model.model_kwargs={}"]


def main() -> NoReturn:
    """Run the command line of this process and exit with its code; see the module's text."""
    text = short_help(sys.argv[1:])
    if text:
        print(text)
        sys.exit()
    quiet()
    run_command(_run)


def quiet() -> None:
    """Leave out what libraries say and users cannot act on."""
    # warnings about Lightning's use of PyTorch, and about callbacks that a test does not have; users cannot act on them
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=r".*add the following callbacks: \['ExactResume'\]")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def run_words(words: list[str]) -> int | None:
    """Run the words of a command line in this process, as `main` does, and return the exit code; errors are raised."""
    quiet()
    sys.argv[1:] = words
    return _run()


def _run() -> int | None:
    # In place: with several devices, Lightning starts the other processes with these arguments.
    words = ["--help" if word == "--help_all" else word for word in sys.argv[1:]]
    sys.argv[1:] = with_weights(with_arguments_of_the_name(with_default_config(words)))
    return guarded(build)


def guarded(work: Callable[[], object]) -> int | None:
    """The exit code of training: how it was stopped, if it was. Raises a `UserError` where the trainer does not fit."""
    try:
        work()
    except SIGTERMException:
        return 143
    except MisconfigurationException as error:  # about the trainer's options
        raise UserError(one_line(error)) from error
    except SystemExit as error:
        # Lightning shuts down on Ctrl-C and then exits with 1.
        return 130 if isinstance(error.__context__, KeyboardInterrupt) else error.code
    except RuntimeError as error:
        # Lightning fails to tear down a run that was stopped between its set-up and its first batch
        context = error.__context__
        while context is not None and not isinstance(context, (KeyboardInterrupt, SIGTERMException)):
            context = context.__context__
        if context is None:
            raise
        return 130 if isinstance(context, KeyboardInterrupt) else 143
