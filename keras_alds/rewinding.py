"""Goes through the learning rates of the epochs before a compression again.

All schedules have a clock: the optimizer's `iterations` for a `LearningRateSchedule`, the epoch for
a `LearningRateScheduler`. It is set back by some epochs, for good. `ReduceLROnPlateau` has none:
the learning rate becomes what it was.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend.clocks import clock, has_schedule, set_back
from keras_alds.core.checks import int_at_least


def check_rewind(epochs: Any, at_epochs: Sequence[int]) -> int:
    """Returns the number of epochs to go through again.

    Raises:
        ValueError: If it is no integer >= 0, or more than lie before a compression.
    """
    count = int_at_least(epochs, "rewind_epochs", 0)
    between = [after - before for before, after in itertools.pairwise((0, *at_epochs))]
    if count > min(between):
        raise ValueError(
            "Expected `rewind_epochs` to be at most the epochs that lie before each compression. "
            f"Received: rewind_epochs={epochs}, at_epoch={', '.join(map(str, at_epochs))}"
        )
    return count


@dataclasses.dataclass(frozen=True)
class _Record:
    """The rates without a schedule, and the clocks of those with one, as an epoch began."""

    rates: dict[Any, float]
    clocks: dict[Any, int]


class Rewinding:
    """The rewinding of one `fit`.

    Args:
        model: The model that is trained.
        callbacks: The other callbacks of `fit`.
        epochs: How many epochs to go back at each compression.
        steps_at: `steps_at(epoch)` is the number of steps that an epoch begins with.
        steps_until: `steps_until(epoch)` is the number of steps up to the beginning of an epoch,
            those of an earlier run included.

    Raises:
        ValueError: If nothing sets learning rates.
    """

    def __init__(
        self,
        model: Any,
        callbacks: Sequence[Any],
        epochs: int,
        steps_at: Callable[[int], int],
        steps_until: Callable[[int], int],
    ) -> None:
        self._model, self._epochs = model, epochs
        self._steps_at, self._steps_until = steps_at, steps_until
        self._backend = _backend.backend_of(model)
        self._records: dict[int, _Record] = {}
        self._restored: set[int] = set()
        known = self._backend.keras.callbacks
        self._schedulers = [c for c in callbacks if isinstance(c, known.LearningRateScheduler)]
        self._plateaus = [c for c in callbacks if isinstance(c, known.ReduceLROnPlateau)]
        if not (self._schedulers or self._plateaus or self._optimizers(scheduled=True)):
            raise ValueError(
                "Expected a learning rate that changes, for `rewind_epochs` to go through again: a "
                "LearningRateSchedule in the optimizer, a LearningRateScheduler or a "
                f"ReduceLROnPlateau. Received: rewind_epochs={epochs} and a constant rate"
            )
        for callback in self._schedulers:
            self._hook(callback)

    def begin(self, epoch: int) -> None:
        """Notes rates and clocks at the beginning of an epoch, before anything changes them."""
        if epoch not in self._records:
            constant = self._optimizers(scheduled=False)
            rates = {optimizer: self._backend.learning_rate(optimizer) for optimizer in constant}
            clocks = {optimizer: clock(optimizer) for optimizer in self._optimizers(scheduled=True)}
            self._records[epoch] = _Record(rates, clocks)

    def rewind(self, epoch: int, times: int, steps: int | None) -> None:
        """Sets clocks and rates back, at the beginning of an epoch.

        Args:
            epoch: The epoch that begins.
            times: How many steps it begins with: a late start takes several at once.
            steps: The number of batches in an epoch, if known.
        """
        for optimizer, now in self._records[epoch].clocks.items():
            start, first = self._records.get(epoch - self._epochs), min(self._records)
            if start is not None and times == 1:
                back = now - start.clocks[optimizer]
            elif steps is not None:
                back = self._epochs * times * steps
            elif first < epoch:
                seen = (now - self._records[first].clocks[optimizer]) // (epoch - first)
                back = self._epochs * times * seen
            else:
                raise ValueError(
                    "Expected `steps_per_epoch` in `fit`, to rewind epochs that another run has "
                    f"trained. Received: initial_epoch={first}, data of unknown "
                    f"length, rewind_epochs={self._epochs}"
                )
            set_back(self._backend, self._model, optimizer, back)
            self._records[epoch].clocks[optimizer] = clock(optimizer)
        self._restore_rates(epoch)

    def end(self) -> None:
        """Leaves the callbacks as they were."""
        for callback in self._schedulers:
            _unhook(callback)

    def _optimizers(self, *, scheduled: bool) -> list[Any]:
        return [
            optimizer
            for optimizer in self._backend.optimizers(self._model)
            if not self._backend.inner_optimizers(optimizer)
            and has_schedule(self._backend, optimizer) is scheduled
        ]

    def _restore_rates(self, epoch: int) -> None:
        """Gives the learning rate the value that it had so many epochs ago, once."""
        if epoch in self._restored:
            return
        self._restored.add(epoch)
        start = self._records.get(epoch - self._epochs)
        if start is not None:
            for optimizer, rate in start.rates.items():
                optimizer.learning_rate = self._records[epoch].rates[optimizer] = rate
        elif self._plateaus or any(map(_needs_rate, self._schedulers)):
            warnings.warn(
                f"Expected training to start at epoch {epoch - self._epochs} or before, to know "
                f"the learning rate there. Received: initial_epoch={min(self._records)}. The "
                "learning rate stays as it is.",
                stacklevel=2,
            )

    def _hook(self, callback: Any) -> None:
        """Lets a `LearningRateScheduler` see the epoch that the clock shows."""
        show = callback.on_epoch_begin

        def on_epoch_begin(epoch: int, logs: dict[str, Any] | None = None) -> None:
            self.begin(epoch)
            if self._steps_at(epoch):
                self._restore_rates(epoch)  # before a rate is chosen that depends on it
            show(epoch - self._epochs * self._steps_until(epoch), logs)

        def set_model(model: Any) -> None:  # the next `fit`, if this one was interrupted
            _unhook(callback)
            callback.set_model(model)

        callback.on_epoch_begin, callback.set_model = on_epoch_begin, set_model


def _unhook(callback: Any) -> None:
    for name in ("on_epoch_begin", "set_model"):
        vars(callback).pop(name, None)


def _needs_rate(scheduler: Any) -> bool:
    """Whether a schedule computes with the learning rate of the epoch before."""
    try:
        return len(inspect.signature(scheduler.schedule).parameters) > 1
    except (TypeError, ValueError):  # no signature, as some callables in C
        return False
