"""The check of the package on one CUDA GPU, and drafts of kernels: docs/gpu.md."""
