"""``luna-vision {fit,validate,test,predict}``, which are ``python train.py ...``, too: LightningCLI.

Exit codes: 0 success, 2 a mistake of the user (one line on stderr), 130 Ctrl-C, 143 SIGTERM, 1 anything else (with its
traceback).
``LUNA_VISION_TRACEBACK=1`` in the environment shows the traceback of the user's mistakes too.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from ..models.factory import training_checkpoint
from ..tasks.base import TimmTask
from ..tasks.checkpoints import AtomicCheckpointIO, best_checkpoint, check_checkpoint
from ..tasks.reporting import ExportBest, ModelSize, PredictionWriter, relative
from ..tasks.resume import ExactResume, resume
from ..tasks.sharding import FSDP2Strategy
from ..tasks.stopping import StopTogether
from ..utils.errors import UserError, arguments_of, is_check, one_line
from ..utils.files import check_output
from ..utils.text import printable
from .common import WRAPPERS, run_command
from .training_help import short_help

SUBCOMMANDS = ("fit", "validate", "test", "predict")
DIGITS = Path(__file__).with_name("digits.yaml")  # what a fit runs when no config is named
# those of a run that names none; "trainer.callbacks+" adds to them, or puts one of the same class in its place
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


class _Parser(LightningArgumentParser):
    def dump(self, *args: Any, **kwargs: Any) -> str:
        """With what was given although the data may say it, which a saved configuration has to hold."""
        return super().dump(*args, **{"skip_link_targets": False} | kwargs)


class LunaCLI(LightningCLI):
    """LightningCLI for the tasks of this package and any of the data modules.

    What the data knows (``num_classes``, ``in_chans``, ``img_size``) a task need not be told.

    ``fit --resume`` goes on with the newest unfinished run of the very same configuration, as does a ``fit`` that SLURM
    has requeued or torchrun has started again; any other is a new run. After ``fit`` the best checkpoint is tested
    (``--test_after_fit false`` leaves that out). ``--ckpt_path`` brings weights and, for ``fit``, the state of the
    optimizer; hyperparameters always come from the configuration, never from the checkpoint, so that what is written in
    a config or on the command line is what runs.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--test_after_fit", type=bool, default=True, help="Test the best checkpoint after fit.")
        help_ = "Let fit go on with the newest unfinished run of this very configuration."
        parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=help_)
        parser.add_argument("--name", type=str, default="run", help="Of the run, which writes into runs/NAME.")
        parser.set_defaults(
            {
                "model": {"class_path": "luna_vision.tasks.ClassificationTask"},
                "trainer.callbacks": [{"class_path": path} for path in CALLBACKS],
            }
        )
        for name in ("num_classes", "in_chans", "img_size"):
            value = partial(self._model_argument, name)
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=value, apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--out", type=str, help="The CSV file; by default predictions.csv in the run's own folder."
            )
        return parser

    def _model_argument(self, name: str, data: LightningDataModule) -> Any:
        """An argument of the task: what is given, else what the data says of itself."""
        arguments = self._get(self.config, "model").get("init_args", {})
        if arguments.get(name) is not None:
            return arguments[name]
        try:
            value = getattr(data, name, None)
        except FileNotFoundError:  # of the training folders, whose names are the classes; images are predicted without
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
        """Jsonargparse lets null pass as a value of any type."""
        for section in ("model", "data", "trainer"):
            if self._get(self.config, section) is None:
                raise UserError(f"{section} must not be null")
        for section in ("model", "data"):
            spec = self._get(self.config, section)
            given = spec.get("init_args", {})
            module, _, name = spec["class_path"].rpartition(".")
            for cls in getattr(import_module(module), name).__mro__:
                for name, kind in get_type_hints(cls.__init__).items() if "__init__" in vars(cls) else ():
                    if given.get(name, kind) is None and kind is not Any and type(None) not in get_args(kind):
                        raise UserError(f"{section}.{name} must not be null")

    def instantiate_classes(self) -> None:
        """With what a constructor has raised: jsonargparse wraps it in a list of all that the value might have been."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raised: BaseException = error
            while raised.__cause__ is not None and str(raised).startswith(WRAPPERS):
                raised = raised.__cause__
            if isinstance(raised, ValueError) and not is_check(raised):  # of a library, about its arguments
                raise UserError(f"the configuration does not fit: {one_line(raised)}") from raised
            raised.__suppress_context__ = True
            raise raised  # noqa: B904 (it has a cause of its own, or none)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With what exact resume needs: atomic checkpoints, and what checkpoints lack of the state."""
        config = self._get(self.config_init, "trainer")
        self._name_run(config)
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
            # after those that write checkpoints: a step whose checkpoint is due is not done again
            trainer.callbacks.append(StopTogether())
        return trainer

    def _name_run(self, config: Any) -> None:
        """Have a run write where its name says, unless the trainer's own options say otherwise."""
        name = self._get(self.config, "name")
        if config["default_root_dir"] is None:
            config["default_root_dir"] = f"runs/{name}"
        if config["logger"] is None:
            config["logger"] = [CSVLogger("runs", name), TensorBoardLogger(f"runs/{name}", "tensorboard")]

    def _callbacks(self, config: Any) -> list[Callback]:
        """Those of the configuration, of a standard one the last alone, without what the trainer is to do without."""
        unwanted = [ProgressBar] if config["enable_progress_bar"] is False else []
        unwanted += [Checkpoint, ExportBest] if config["enable_checkpointing"] is False else []
        given = config["callbacks"] or []
        callbacks = [c for c in (given if isinstance(given, list) else [given]) if not isinstance(c, tuple(unwanted))]
        if self.subcommand == "predict" and (out := self._get(self.config, "out")):
            check_output(Path(out), [".csv"], overwrite=True)
            callbacks.append(PredictionWriter(out))
        last = {type(c).__name__: c for c in callbacks}
        standard = {path.rpartition(".")[2] for path in CALLBACKS}
        return [c for c in callbacks if type(c).__name__ not in standard or c is last[type(c).__name__]]

    def _configuration(self) -> dict[str, Any]:
        config = self.config[self.subcommand].clone()
        for name in ("config", "ckpt_path", "resume"):
            config.pop(name, None)
        content = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
        return json.loads(json.dumps(content, default=str))  # as it is read from a file again

    def _parse_ckpt_path(self) -> None:
        # The base class would let the checkpoint's hyperparameters win over the given ones without a word.
        pass

    def check_run(self) -> None:
        """Find what is missing before the loggers create the run's folder."""
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
        if self.subcommand == "fit" and not self.trainer.limit_train_batches:
            raise ValueError("limit_train_batches is 0: there is nothing to train")
        self.model.check_start(optimizer=self.subcommand == "fit")
        if self.datamodule is not None and self.trainer.world_size == 1:
            self.datamodule.prepare_data()
            self.datamodule.setup(self.subcommand)
            self.model.check_data(self.datamodule, self.subcommand)
            self.model.check_classes(checkpoint, self.datamodule, str(path))
            if self.subcommand == "fit" and self._get(self.config, "test_after_fit"):
                self.datamodule.setup("test")  # else its mistakes would show when all is done
        if self.subcommand == "fit":
            checkpoint = resume(self.trainer, self._configuration(), self._get(self.config, "resume"))
            self.config[self.subcommand]["resume"] = False  # in the run's config.yaml, which is for new runs
            if checkpoint:
                self.config_init[self.subcommand]["ckpt_path"] = checkpoint

    before_fit = before_validate = before_test = before_predict = check_run

    def after_fit(self) -> None:
        best = best_checkpoint(self.trainer)
        if best and self._get(self.config, "test_after_fit"):
            # of nothing where there are no test images
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
    """Build task, data and trainer, and do what the subcommand says. Errors are raised.

    Args:
        args: the words of the command line; None takes those of this process.
        run: False knows no subcommands and only builds.
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
        # Errors reach main() as exceptions; jsonargparse would print its usage and leave.
        parser_kwargs={**strict, **{name: dict(strict) for name in SUBCOMMANDS if run}},
        args=args,
        run=run,
    )


def with_default_config(args: list[str]) -> list[str]:
    """Insert the digits' config after ``fit`` unless a config is named; it is never mixed into another one."""
    if "fit" not in args or any(arg in ("-c", "--config") or arg.startswith(("--config=", "-c=")) for arg in args):
        return args
    position = args.index("fit") + 1
    return [*args[:position], "--config", str(DIGITS), *args[position:]]


def main() -> NoReturn:
    """Run the command line of this process and exit with its code; see the module's text."""
    text = short_help(sys.argv[1:])
    if text:
        print(text)
        sys.exit()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of PyTorch, nothing a user can change
    # of a callback that every fit has of itself, and of scores of checkpoints, which a test does not write
    warnings.filterwarnings("ignore", message=r".*add the following callbacks: \['ExactResume'\]")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    # In place: with several devices, Lightning starts the other processes with these arguments.
    sys.argv[1:] = with_default_config(["--help" if word == "--help_all" else word for word in sys.argv[1:]])
    run_command(_run)


def _run() -> int | None:
    try:
        build()
    except SIGTERMException:
        return 143
    except MisconfigurationException as error:  # of a trainer, about its options
        raise UserError(one_line(error)) from error
    except SystemExit as error:
        # Lightning shuts down on Ctrl-C and then exits with 1.
        return 130 if isinstance(error.__context__, KeyboardInterrupt) else error.code
    except RuntimeError as error:
        # stopped between its set-up and its first batch, a run cannot be torn down by Lightning, which says so
        context = error.__context__
        while context is not None and not isinstance(context, (KeyboardInterrupt, SIGTERMException)):
            context = context.__context__
        if context is None:
            raise
        return 130 if isinstance(context, KeyboardInterrupt) else 143
