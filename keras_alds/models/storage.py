"""Storage for tensors of many examples in bounded memory."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from keras_alds._backend import tensors
from keras_alds._backend.graphs import mask_of, set_mask

#: Bytes of tensors to keep in memory; the rest goes to temporary files.
MEMORY_LIMIT = 1 << 28


class Store:
    """Keeps tensors in memory up to a limit, and in temporary files beyond it.

    The files are deleted together with the store.

    Args:
        limit: Bytes to keep in memory. Defaults to `MEMORY_LIMIT`.

    Attributes:
        bytes: Bytes currently in memory.
        peak: The largest number of bytes so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = MEMORY_LIMIT if limit is None else limit
        self.bytes = self.peak = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def keep(self, value: Any) -> Any:
        """Stores `value` and returns a handle for `load` and `drop`."""
        size = tensors.bytes_of(value)
        if not tensors.is_dense(value) or self.bytes + size <= self.limit:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="keras_alds_")
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        value.numpy().tofile(path)
        return _File(path, value.numpy().dtype, tuple(value.shape), mask_of(value))

    def has_room(self, value: Any) -> bool:
        """Whether another tensor, which is not needed, leaves half of the memory free."""
        return self.bytes + tensors.bytes_of(value) <= self.limit // 2

    def load(self, kept: Any) -> Any:
        """The stored value."""
        return kept.load() if isinstance(kept, _File) else kept

    def drop(self, kept: Any) -> None:
        """Frees the memory or file of a value."""
        if isinstance(kept, _File):
            kept.path.unlink()
        else:
            self.bytes -= tensors.bytes_of(kept)


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    mask: Any

    def load(self) -> Any:
        values = np.fromfile(self.path, self.dtype).reshape(self.shape)
        tensor = tensors.tensor(values)
        if self.mask is not None:
            set_mask(tensor, self.mask)
        return tensor
