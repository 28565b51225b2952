"""The check of the package on one CUDA GPU, and what it predicts without one: docs/gpu.md."""
