"""Examples in random minibatches, with images shifted and flipped, and examples held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_alds._backend import tensors
from keras_alds.core.slicing import Array
from keras_alds.models.data import examples_at_once
from keras_alds.models.storage import Store

#: One example in so many is held out, and at most so many in all.
HELD_OUT_EVERY, MOST_HELD_OUT = 4, 128
# Stored batches that are in memory at once, among whose examples minibatches are drawn.
_MIXED = 16
# Images have one or three channels and sides of at least this many pixels.
_LEAST_SIDE, _CHANNELS = 8, (1, 3)
# Images are shifted by at most this part of their sides.
_SHIFT = 8


class Split:
    """Examples to train on and examples held out, in bounded memory.

    Args:
        examples: Batches and their numbers of examples.
        total: The number of examples, or None if it is not known.
        by_batch: Whether to hold out whole batches, as for models of a fixed batch size.

    Attributes:
        held: The examples held out, in batches.
        trained: The number of examples to train on.

    Raises:
        ValueError: If there are too few batches to hold one out.
    """

    def __init__(
        self, examples: Iterable[tuple[Any, int]], total: int | None, *, by_batch: bool
    ) -> None:
        self._store = Store()
        self._batches: list[Any] = []
        self._held: list[Any] = []
        every = max(HELD_OUT_EVERY, -(-(total or 0) // MOST_HELD_OUT))
        seen = kept = batches = 0
        for batch, count in examples:
            batches += 1
            if not by_batch and all(map(tensors.is_dense, tensors.flatten(batch))):
                rows = np.arange(seen, seen + count)
                out = rows % every == every - 1
                for chosen, goal in ((out, self._held), (~out, self._batches)):
                    if chosen.any():
                        goal.append(self._kept(_rows(batch, np.flatnonzero(chosen))))
                kept += int(out.sum())
            else:
                # The second of every four, so that two batches suffice.
                out_of_it = batches % every == 2 and kept < MOST_HELD_OUT
                (self._held if out_of_it else self._batches).append(self._kept(batch))
                kept += count * out_of_it
            seen += count
        if not self._held:
            raise ValueError(
                "Expected at least two batches of calibration data, one of which is held out. "
                f"Received: {batches} of {seen} examples"
            )
        self.trained = seen - kept
        self._by_batch = by_batch

    def _kept(self, batch: Any) -> Any:
        return tensors.map_structure(self._store.keep, batch)

    def _loaded(self, batch: Any) -> Any:
        return tensors.map_structure(self._store.load, batch)

    @property
    def held(self) -> Iterator[Any]:
        """The examples held out, in batches."""
        return map(self._loaded, self._held)

    def drawn(self, random: np.random.Generator, size: int) -> Iterator[list[tuple[Any, int]]]:
        """Endless minibatches, each in parts that fit in memory, with their numbers of examples."""
        parts: list[tuple[Any, int]] = []
        while True:
            for batch, count in self._parts(random, size):
                parts.append((batch, count))
                if sum(count for _, count in parts) >= min(size, self.trained):
                    yield parts
                    parts = []

    def _parts(self, random: np.random.Generator, size: int) -> Iterator[tuple[Any, int]]:
        """All examples once in random order."""
        order = random.permutation(len(self._batches))
        for start in range(0, len(order), _MIXED):
            some = [self._loaded(self._batches[n]) for n in order[start : start + _MIXED]]
            if self._by_batch or not _can_be_joined(some):
                yield from ((batch, _count(batch)) for batch in some)
                continue
            joined = tensors.map_structure(
                lambda *parts: np.concatenate([tensors.to_numpy(part) for part in parts]), *some
            )
            rows = random.permutation(_count(joined))
            at_once = min(size, examples_at_once(joined))
            for first in range(0, len(rows), at_once):
                chosen = rows[first : first + at_once]
                yield _rows(joined, chosen), len(chosen)


def _can_be_joined(batches: Sequence[Any]) -> bool:
    flat = [tensors.flatten(batch) for batch in batches]
    return all(tensors.is_dense(x) for batch in flat for x in batch) and all(
        [x.shape[1:] for x in batch] == [x.shape[1:] for x in flat[0]] for batch in flat
    )


def _count(batch: Any) -> int:
    return int(tensors.flatten(batch)[0].shape[0])


def _rows(batch: Any, rows: Array) -> Any:
    return tensors.map_structure(
        lambda x: tensors.tensor(x[rows] if isinstance(x, np.ndarray) else tensors.gather(x, rows)),
        batch,
    )


# -- Images ----------------------------------------------------------------------------------------


def image_axes(inputs: Any) -> tuple[int, int] | None:
    """The axes of height and width, if there is one input of images; None otherwise."""
    found = [axes for x in tensors.flatten(inputs) if (axes := _axes(x)) is not None]
    return found[0] if len(found) == 1 else None


def _axes(x: Any) -> tuple[int, int] | None:
    if not tensors.is_dense(x) or len(x.shape) != 4:
        return None
    if not (x.dtype.is_floating or x.dtype == tensors.uint8):
        return None
    for channels, axes in ((3, (1, 2)), (1, (2, 3))):
        if x.shape[channels] in _CHANNELS and min(x.shape[axis] for axis in axes) >= _LEAST_SIDE:
            return axes
    return None


def shifted(inputs: Any, random: np.random.Generator) -> Any:
    """The images of a batch, each shifted at random by at most an eighth of its sides.

    What is shifted in continues the image, mirrored at its edge.
    """

    def shift(x: Any, axes: tuple[int, int]) -> Array:
        values = tensors.to_numpy(x)
        for axis in axes:
            side = values.shape[axis]
            by = random.integers(-(side // _SHIFT), side // _SHIFT + 1, size=len(values))
            places = np.arange(side) + by[:, None]
            places = np.abs(places)
            places = np.minimum(places, 2 * (side - 1) - places)
            shape = [len(values), 1, 1, 1]
            shape[axis] = side
            values = np.take_along_axis(values, places.reshape(shape), axis=axis)
        return values

    return _images(inputs, shift)


def flipped(inputs: Any, random: np.random.Generator | None = None) -> Any:
    """The images of a batch, mirrored left to right: all, or at random half of them."""

    def flip(x: Any, axes: tuple[int, int]) -> Array:
        values = tensors.to_numpy(x)
        mirrored = np.flip(values, axes[1])
        if random is None:
            return mirrored
        some = random.random(len(values)) < 0.5
        return np.where(some[:, None, None, None], mirrored, values)

    return _images(inputs, flip)


def _images(inputs: Any, change: Any) -> Any:
    def changed(x: Any) -> Any:
        axes = _axes(x)
        return x if axes is None else tensors.cast(tensors.tensor(change(x, axes)), x.dtype)

    return tensors.map_structure(changed, inputs)
