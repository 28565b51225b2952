"""Train, evaluate or apply a model: ``python train.py fit`` trains the default, ``--config`` names another run."""

from luna_vision.cli.train import main

if __name__ == "__main__":
    main()
