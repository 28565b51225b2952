"""Statistics of pixels, brought to the channels that a model has."""

import math
from collections.abc import Sequence

__all__ = ["per_channel"]


def per_channel(name: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Bring statistics to ``in_chans`` numbers: one is repeated, three are averaged where there are not three channels.

    Raises:
        ValueError: Another number of them, one that is not finite, or a standard deviation that is not above 0.
    """
    values = tuple(float(v) for v in values)
    counts = sorted({1, 3, in_chans})
    if len(values) not in counts or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        allowed = " or ".join(map(str, counts))
        raise ValueError(f"{name} must be {allowed} finite numbers{', above 0' if name == 'std' else ''}, got {values}")
    if len(values) == in_chans:
        return values
    return (sum(values) / len(values),) * in_chans
