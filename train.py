"""Train, evaluate or apply a model: ``python train.py fit`` trains the default, ``--config`` names another run."""

from pathlib import Path

from luna_vision.tasks.cli import main

if __name__ == "__main__":
    main(default_config=Path(__file__).parent / "configs" / "digits.yaml")
