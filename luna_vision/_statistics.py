"""Statistics of pixels, brought to the channels that a model has."""

import math
from collections.abc import Sequence

__all__ = ["per_channel"]


def per_channel(name: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Bring statistics to ``in_chans`` numbers: one is repeated, three are averaged for a grey image."""
    values = tuple(float(v) for v in values)
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        raise ValueError(f"{name} must be 1 or 3 finite numbers{', above 0' if name == 'std' else ''}, got {values}")
    if len(values) == in_chans:
        return values
    return values * 3 if in_chans == 3 else (sum(values) / 3,)
