"""`RankMonitor`: the ranks of all kernels during training."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from keras_alds import _backend, plots
from keras_alds._backend.summaries import EventWriter
from keras_alds.core.checks import is_fraction, positive_int
from keras_alds.models.inventory import Inventory, has_weights
from keras_alds.models.ranks import ModelRanks, measured_ranks
from keras_alds.models.selection import candidates_of
from keras_alds.models.turns import alone
from keras_alds.options import LEAST_CR, Options
from keras_alds.plots.of_results import RANKS
from keras_alds.tables import write_csv

_COLUMNS = ("epoch", "layer", "full_rank", *RANKS, "removable")


class RankMonitor(_backend.Callback):
    """Measures the ranks of all layers during training, to see when to compress.

    After an epoch, each kernel W that can be factorized is unfolded to a matrix (fold scheme 0)
    with the singular values σ_1 ≥ σ_2 ≥ …, and measured:

    - the stable rank, ‖W‖²_F / σ_1²;
    - the effective rank, exp(−Σ p_i ln p_i) with p_i = σ_i / Σ σ_m;
    - the energy rank, the least number of singular values that hold `energy` of ‖W‖²_F.

    The logs of every epoch contain `alds_stable_rank`, `alds_effective_rank` and
    `alds_energy_rank`, the means over the layers of rank divided by full rank, and
    `alds_reachable_cr`: the largest `cr` for which every layer's relative error is at most
    `error`. So `History`, `CSVLogger` and `TensorBoard` have them, if `RankMonitor` comes before
    them in the list of callbacks. It does not predict accuracy. Watch how it changes.

    The callback works in `fit` of Keras 3 and tf_keras. It changes nothing in the training. With
    one slice it takes one eigenvalue decomposition per layer, a few milliseconds for a small net.
    A factorized layer is measured by the product of its factors, and keeps its size in
    `alds_reachable_cr`. A second `fit` starts a new history.

    Args:
        error: Float, 0 < error < 1. The largest relative error of a layer for
            `alds_reachable_cr`: σ_{j+1} / σ_1 of its kernel at rank j, as in the method `"alds"`.
            Defaults to 0.3.
        energy: Float, 0 < energy < 1. For the energy rank. Defaults to 0.99.
        every: Integer >= 1. Measures after the first of every so many epochs, and after the last
            epoch. The logs of other epochs repeat the last numbers. Defaults to 1.
        exclude: Layers to leave out, as for `select`. Defaults to none.
        max_slices: Integer or None. The largest number of slices for `alds_reachable_cr`, as for
            `select`. Each number of slices takes decompositions of its own. Defaults to 1; None
            allows any.
        log_dir: Folder for the ranks of each layer, for TensorBoard. Defaults to None: none are
            written.

    Attributes:
        history: List of dicts, one for each layer and measured epoch, with the keys `epoch`,
            `layer`, `full_rank`, `stable_rank`, `effective_rank`, `energy_rank` and `removable`,
            the fraction of the layer's parameters that its error allows to remove (None for a
            factorized layer). `pandas.DataFrame(monitor.history)` is a table of them.

    Raises:
        ValueError: From the constructor, if an argument is invalid. From `fit`, if no layer can be
            factorized, or a kernel holds NaN or infinity.

    Example:
    ```python
    monitor = keras_alds.RankMonitor()
    history = model.fit(x, y, epochs=2, callbacks=[monitor], verbose=0)
    history.history["alds_reachable_cr"]  # one number for each epoch
    monitor.to_csv("ranks.csv")
    ```

    References:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO
        2007: the singular values are normalised to the sum 1.
    """

    history: list[dict[str, Any]]

    def __init__(
        self,
        *,
        error: float = 0.3,
        energy: float = 0.99,
        every: int = 1,
        exclude: Any = (),
        max_slices: int | None = 1,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.error = _fraction(error, "error")
        self.energy = _fraction(energy, "energy")
        self.every = positive_int(every, "every")
        given = {"method": "alds", "schemes": 0, "exclude": exclude, "max_slices": max_slices}
        self._options = Options.checked(LEAST_CR, given, has_data=False, caller="RankMonitor")
        self._log_dir = log_dir
        self._writer: EventWriter | None = None
        self.history = []
        self._logs: dict[str, float] = {}
        self._checked = False

    # -- Methods that Keras calls ------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts a new history; raises a ValueError if there is nothing to measure."""
        self.history, self._logs, self._checked = [], {}, False
        if has_weights(self.model):
            self._inventory()
        if self._log_dir is not None:
            self._writer = EventWriter(self._log_dir)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures the layers, and adds to the logs."""
        if not self._logs or epoch % self.every == 0 or epoch + 1 == self.params.get("epochs"):
            with alone(self.model):
                inventory = self._inventory()
                self._keep(epoch, measured_ranks(inventory, self._options, self.error, self.energy))
        if logs is not None:
            logs.update(self._logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Closes the file for TensorBoard."""
        if self._writer is not None:
            self._writer.close()

    # -- The results -------------------------------------------------------------------------

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `history` as a CSV file.

        Args:
            path: The file.
        """
        write_csv(path, self.history, _COLUMNS)

    def plot(self, column: str = "effective_rank", ax: Any = None) -> Any:
        """Plots one of the ranks of every layer, divided by its full rank, against the epochs.

        Args:
            column: `"stable_rank"`, `"effective_rank"` or `"energy_rank"`.
            ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

        Returns:
            The axes. `axes.figure.savefig("ranks.png")` writes a file. First layers are dark, last
            ones are light. See `keras_alds.plots.rank_history`.

        Raises:
            ValueError: If `column` is none of these.
            ImportError: If matplotlib is not installed.
        """
        return plots.rank_history(self, column, ax=ax)

    # -- The measurement ---------------------------------------------------------------------

    def _inventory(self) -> Inventory:
        inventory = Inventory.of(self.model, self._options.exclude)
        if not self._checked and all(record.excluded for record in inventory.factorized):
            candidates_of(inventory, self._options, stacklevel=4)
        self._checked = True
        return inventory

    def _keep(self, epoch: int, found: ModelRanks) -> None:
        for path, ranks in found.layers.items():
            row = (epoch, path, ranks.full, ranks.stable, ranks.effective, ranks.energy)
            self.history.append(dict(zip(_COLUMNS, (*row, found.removable.get(path)), strict=True)))
            if self._writer is not None:
                scalars = zip(RANKS, row[3:], strict=True)
                self._writer.scalars(epoch, {f"{path}/{name}": float(v) for name, v in scalars})
        rows = self.history[-len(found.layers) :]
        self._logs = {
            f"alds_{name}": float(np.mean([row[name] / row["full_rank"] for row in rows]))
            for name in RANKS
        }
        self._logs["alds_reachable_cr"] = found.reachable_cr


def _fraction(value: Any, name: str) -> float:
    if not is_fraction(value):
        raise ValueError(
            f"Expected `{name}` of RankMonitor to be a number with 0 < {name} < 1. "
            f"Received: {name}={value!r}"
        )
    return float(value)
