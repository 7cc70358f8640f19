"""Scalars for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping

import tensorflow as tf


class ScalarWriter:
    """Writes event files of scalars.

    Args:
        folder: Where to write them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._writer = tf.summary.create_file_writer(os.fspath(folder))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes some scalars of one step."""
        with self._writer.as_default(), tf.summary.record_if(True):
            for name, value in scalars.items():
                tf.summary.scalar(name, value, step=step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
