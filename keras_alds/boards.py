"""`Board`: what `ALDSCompress` shows in TensorBoard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend.strategies import Replicas
from keras_alds._backend.summaries import EventWriter, can_write
from keras_alds.models.inventory import Inventory, count_params, has_weights
from keras_alds.models.ranks import kernel_spectra
from keras_alds.models.resources import count_macs
from keras_alds.plan import CompressionPlan
from keras_alds.tables import plan_table

#: The run, beside Keras's own `train` and `validation`.
RUN = "alds"


class Board:
    """Writes the compression of a model as a run of TensorBoard.

    The scalars come after every epoch, the plan before the epoch in which it is applied, and the
    singular values of all kernels before each compression and at the end of the training.

    Args:
        folder: Where to write.
        model: The model, or the part of it that is compressed.
    """

    def __init__(self, folder: str | os.PathLike[str], model: Any) -> None:
        self._writer: EventWriter | None = EventWriter(folder)
        self._model = model
        self._macs: int | None = None
        self._counted: int | None = None
        self._plan: CompressionPlan | None = None
        self._epoch = -1

    @classmethod
    def of(
        cls,
        log_dir: str | os.PathLike[str] | None,
        siblings: Sequence[Any],
        trainer: Any,
        model: Any,
        suffix: str,
    ) -> Board | None:
        """A board in a folder, or beside what a `TensorBoard` callback writes, if there is one.

        Of several processes, the chief writes.

        Args:
            log_dir: The folder, or None to look for a `TensorBoard` callback.
            siblings: The other callbacks of `fit`.
            trainer: The model that is trained.
            model: The model, or the part of it that is compressed.
            suffix: The end of the run's name.

        Raises:
            ImportError: If `log_dir` is given and tensorboard is not installed.
        """
        if log_dir is None and can_write():
            found = map(_backend.backend_of(trainer).board_folder, siblings)
            log_dir = next(filter(None, found), None)
        if log_dir is None or Replicas(trainer).worker != 0:
            return None
        return cls(os.path.join(log_dir, RUN + suffix.replace("/", "_")), model)

    def add_spectra(self, step: int) -> None:
        """Writes the singular values of all kernels, dense or in two factors."""
        if self._writer is None or not has_weights(self._model):
            return
        try:
            found = kernel_spectra(Inventory.of(self._model))
        except ValueError:  # NaN: the training goes on, and so may its board
            return
        values = {f"singular_values/{path}": spectrum for path, spectrum in found.items()}
        self._writer.histograms(step, values)

    def add_plan(self, step: int, plan: CompressionPlan) -> None:
        """Writes a plan that was applied before an epoch, as a table."""
        self._plan = plan
        if self._writer is not None:
            self._writer.text(step, "plan", markdown(plan))

    def add_epoch(self, epoch: int, cr: float, plan: CompressionPlan | None) -> None:
        """Writes the scalars of an epoch; those of layers once there is a plan.

        Several callbacks may share a board: the first one writes.

        Args:
            epoch: The index of the epoch.
            cr: The fraction of parameters that is removed by now.
            plan: What was applied before this training, if anything was.
        """
        if self._writer is None or epoch == self._epoch:
            return
        self._epoch, params = epoch, count_params(self._model)
        scalars: dict[str, float] = {"model/cr": cr, "model/parameters": params}
        if params != self._counted:
            self._macs, self._counted = _macs(self._model), params
        if self._macs is not None:
            scalars["model/MACs"] = self._macs
        plan = self._plan or plan
        for choice in () if plan is None else plan.factorized:
            scalars[f"rank/{choice.layer}"] = choice.rank or 0
            scalars[f"error/{choice.layer}"] = choice.error
        self._writer.scalars(epoch, scalars)

    def close(self) -> None:
        """Writes the last singular values, and closes the file."""
        self.add_spectra(self._epoch + 1)
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def markdown(plan: CompressionPlan) -> str:
    """The table of a plan as Markdown, with what is said about it above and below."""
    table = plan_table(plan)
    return "\n\n".join([table.title, table.to_markdown(), *table.lines])


def _macs(model: Any) -> int | None:
    """Multiply–accumulates of a model; None if they cannot be counted."""
    if not _backend.backend_of(model).is_model(model):
        return None
    with contextlib.suppress(Exception):  # a user's `call` runs: no training ends for a figure
        return count_macs(model)
    return None
