"""The pictures of the documentation, drawn from models and results: `python -m experiments.figures.NAME`."""
