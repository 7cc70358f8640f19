"""The second moment of the inputs of two second moments, such as those of two parts of the data."""

from __future__ import annotations

import numpy as np

from keras_alds.core.calibration.moments import FewInputs, SecondMoment, are_few


def joined(first: SecondMoment | None, second: SecondMoment | None) -> SecondMoment | None:
    """The second moment of the inputs of both, and of the held-out inputs of both.

    Sums are in float64. The ridge is the default one for so many inputs.

    Args:
        first: A second moment, or None where there were no inputs.
        second: Another one of as many unfolded inputs.
    """
    if first is None or second is None:
        return second if first is None else first
    held = joined(first.held_out, second.held_out)
    if isinstance(first, FewInputs) and isinstance(second, FewInputs):
        count = first.count + second.count
        if are_few(count, first.block_side):
            return _few(first, second, held)
        first = SecondMoment(
            [*map(first.matrix, range(first.block_count))], first.count, first.mean
        )
    result = first.with_held_out(second)
    result.held_out = held
    return result


def _few(first: FewInputs, second: FewInputs, held: SecondMoment | None) -> FewInputs:
    """The inputs of both, the held-out ones last."""
    both = first, second
    ends = [few.count - (few.held_out.count if few.held_out else 0) for few in both]
    fit = [few.rows[:end] for few, end in zip(both, ends, strict=True)]
    rest = [few.rows[end:] for few, end in zip(both, ends, strict=True)]
    known = first.mean is not None and second.mean is not None
    result = FewInputs(np.concatenate([*fit, *rest]), first.block_count, mean=known)
    result.held_out = held
    return result
