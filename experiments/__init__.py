"""Scripts that measure luna_vision: comparison and ablation, benchmarks, figures.

They run from the root of a clone and are no part of the installed package. What they have found is in docs/results.
"""
