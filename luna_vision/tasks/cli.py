"""The command line: ``python train.py {fit,validate,test,predict}``, LightningCLI with one-line errors.

Exit codes: 0 success, 2 a mistake of the user (one line on stderr), 130 Ctrl-C, 143 SIGTERM, 1 anything else (with its
traceback).
``LUNA_VISION_TRACEBACK=1`` in the environment shows the traceback of the user's mistakes too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from luna_vision._commands import training_checkpoint
from luna_vision.utils.text import printable

from .base import TimmTask
from .checkpoints import AtomicCheckpointIO, best_checkpoint, check_checkpoint
from .classification import ClassificationTask
from .guard import NonFiniteLossError
from .reporting import ExportBest, ModelSize, relative
from .resume import ExactResume, resume
from .sharding import FSDP2Strategy, is_sharded
from .stopping import StopTogether

SUBCOMMANDS = ("fit", "validate", "test", "predict")
USER_ERRORS = (ArgumentError, MisconfigurationException, NonFiniteLossError, OSError, ValueError)


class LunaCLI(LightningCLI):
    """LightningCLI for the tasks of this package and any of the data modules.

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

    def before_instantiate_classes(self) -> None:
        """Where a config says ``num_classes: null``, count those of the data."""
        model, data = self._get(self.config, "model"), self._get(self.config, "data")
        model = model.get("init_args", model)
        if data is not None and "num_classes" in model and model.num_classes is None:
            model.num_classes = instantiate_class((), data.as_dict()).num_classes

    def instantiate_classes(self) -> None:
        """What a constructor raises is about the arguments that it was given, whatever its type."""
        try:
            super().instantiate_classes()
        except USER_ERRORS:
            raise
        except Exception as error:
            raise ValueError(f"the configuration does not fit: {type(error).__name__}: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With what exact resume needs: atomic checkpoints, and what checkpoints lack of the state."""
        summary = self._get(self.config_init, "trainer")["enable_model_summary"]
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
            if not (Path(path).is_file() or is_sharded(path)):
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
    named = names_its_task(sys.argv[1:] if args is None else args)
    return LunaCLI(
        TimmTask if named else ClassificationTask,
        LightningDataModule,
        subclass_mode_model=named,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        # Errors reach main() as exceptions; jsonargparse would print its usage and leave.
        parser_kwargs={"exit_on_error": False, **{name: {"exit_on_error": False} for name in SUBCOMMANDS if run}},
        args=args,
        run=run,
    )


def names_its_task(args: list[str]) -> bool:
    """Whether a config or an argument says by ``model.class_path`` what the task is; if not, it is classification."""
    files = [value for name, value in zip(args, args[1:], strict=False) if name in ("-c", "--config")]
    files += [arg.partition("=")[2] for arg in args if arg.startswith(("--config=", "-c="))]
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # what is wrong with it is said when it is parsed
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, str) or (isinstance(model, dict) and "class_path" in model):
            return True
    return any(arg == "--model" or arg.startswith(("--model=", "--model.class_path")) for arg in args)


def with_default_config(args: list[str], default_config: Path | None) -> list[str]:
    """Insert ``--config default_config`` after ``fit`` unless a config is named."""
    if "fit" not in args or default_config is None:
        return args
    if any(arg in ("-c", "--config", "-h", "--help") or arg.startswith(("--config=", "-c=")) for arg in args):
        return args
    position = args.index("fit") + 1
    return [*args[:position], "--config", str(default_config), *args[position:]]


def main(default_config: Path | None = None) -> None:
    """Run the command line and exit with its code; see the module's text.

    Args:
        default_config: what ``fit`` runs when no config is named. It is never mixed into another one.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of PyTorch, nothing a user can change
    # of a callback that every fit has of itself, and of scores of checkpoints, which a test does not write
    warnings.filterwarnings("ignore", message=r".*add the following callbacks: \['ExactResume'\]")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    # In place: with several devices, Lightning starts the other processes with these arguments.
    sys.argv[1:] = with_default_config(sys.argv[1:], default_config)
    try:
        build()
    except KeyboardInterrupt:
        sys.exit(130)
    except SIGTERMException:
        sys.exit(143)
    except SystemExit as error:
        # Lightning shuts down on Ctrl-C and then exits with 1.
        sys.exit(130 if isinstance(error.__context__, KeyboardInterrupt) else error.code)
    except RuntimeError as error:
        # stopped between its set-up and its first batch, a run cannot be torn down by Lightning, which says so
        context = error.__context__
        while context is not None and not isinstance(context, (KeyboardInterrupt, SIGTERMException)):
            context = context.__context__
        if context is None:
            raise
        sys.exit(130 if isinstance(context, KeyboardInterrupt) else 143)
    except USER_ERRORS as error:
        if os.environ.get("LUNA_VISION_TRACEBACK") == "1":
            raise
        print(f"error: {printable(one_line(error))}", file=sys.stderr)
        sys.exit(2)


def one_line(error: BaseException) -> str:
    """What went wrong, in one line, out of messages that have many."""
    text = str(error).strip()
    if "Original Traceback" in text:  # raised in a data worker: the last line is the worker's own error
        last = text.rsplit("\n", 1)[-1]
        text = last.partition(": ")[2] or last
    if "Problem with given class_path" in text:  # jsonargparse goes on to list all that the value might have been
        text = re.split(r"\n\s*- |\n\s*Given value", text[text.index("Problem with given class_path") :])[0]
    return " ".join(text.split()) or type(error).__name__
