"""The clock of an optimizer, which its learning-rate schedule goes by, and how to set it back."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.layers import Model, Optimizer

#: The decay rates of averages that are divided by 1 - rate ** iterations, by class and slot.
_CORRECTED: dict[str, dict[str, str]] = {
    "Adam": {
        **dict.fromkeys(("_momentums", "m"), "beta_1"),
        **dict.fromkeys(("_velocities", "_velocity_hats", "v", "vhat"), "beta_2"),
    },
    "Adamax": dict.fromkeys(("_m", "m"), "beta_1"),
    "Nadam": dict.fromkeys(("_velocities", "v"), "beta_2"),
    "Lamb": {"_momentums": "beta_1", "_velocities": "beta_2"},
}


def has_schedule(backend: _backend.Backend, optimizer: Optimizer) -> bool:
    """Whether a `LearningRateSchedule` gives an optimizer its learning rate."""
    # tf_keras's legacy optimizers have no such attribute and return the schedule itself.
    rate = getattr(optimizer, "_learning_rate", None)
    rate = optimizer.learning_rate if rate is None else rate
    return isinstance(rate, backend.keras.optimizers.schedules.LearningRateSchedule)


def clock(optimizer: Optimizer) -> int:
    """The steps that an optimizer has taken, those that only accumulate gradients included."""
    return int(tf.convert_to_tensor(_counter(optimizer)))  # also that of several replicas


def set_back(backend: _backend.Backend, model: Model, optimizer: Optimizer, steps: int) -> None:
    """Sets the clock of an optimizer back, at most to 0.

    Averages that Adam and its like divide by 1 - beta ** iterations are scaled, so that the
    quotients stay.

    Args:
        backend: The backend of the model.
        model: The model that the optimizer trains.
        optimizer: The optimizer, no wrapper.
        steps: By how many steps; rounded down to those that update weights.
    """
    together = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    before = clock(optimizer)
    after = before - min(steps, before) // together * together
    if after == before:
        return
    if backend.is_optimizer_built(optimizer):
        targets = backend.optimizer_targets(optimizer, list(model.variables))
        for name, slot in backend.slots(optimizer, targets).items():
            if (decay := _decay(optimizer, name)) is not None:
                corrections = [1 - decay ** (count // together) for count in (after, before)]
                for variable in slot if corrections[1] else ():
                    if variable is not None:
                        variable.assign(variable * (corrections[0] / corrections[1]))
    _counter(optimizer).assign(after)


def _counter(optimizer: Optimizer) -> Any:
    # `iterations` of Keras 3 counts the updates only. Legacy optimizers make it at the first look.
    counter = getattr(optimizer, "_iterations", None)
    return optimizer.iterations if counter is None else counter


def _decay(optimizer: Optimizer, slot: str) -> float | None:
    """The decay rate of a slot whose average is corrected by the number of steps, or None."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _CORRECTED:
            name = _CORRECTED[cls.__name__].get(slot)
            return None if name is None else float(getattr(optimizer, name))
    return None
