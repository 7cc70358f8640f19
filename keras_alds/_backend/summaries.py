"""Event files for TensorBoard."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import numpy as np
import tensorflow as tf


def can_write() -> bool:
    """Whether TensorFlow can write event files: it needs the package tensorboard for that."""
    return importlib.util.find_spec("tensorboard") is not None


class EventWriter:
    """Writes event files.

    Raises:
        ImportError: If tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not can_write():
            raise ImportError(
                "tensorboard is needed for `log_dir` and is not installed. "
                'Remedy: pip install "keras_alds[tensorboard]"'
            )
        self._writer = tf.summary.create_file_writer(os.fspath(folder))

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes some scalars of one step."""
        with self._writer.as_default(), tf.summary.record_if(True):
            for name, value in scalars.items():
                tf.summary.scalar(name, value, step=step)
        self._writer.flush()

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes how some values are distributed."""
        with self._writer.as_default(), tf.summary.record_if(True):
            for name, array in values.items():
                tf.summary.histogram(name, array, step=step)
        self._writer.flush()

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text, which TensorBoard reads as Markdown."""
        with self._writer.as_default(), tf.summary.record_if(True):
            tf.summary.text(name, markdown, step=step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
