"""Training: optimizers and their state, step functions, callbacks and backups."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_alds._backend.layers import (
    Layers,
    Model,
    Optimizer,
    Undo,
    Variable,
    become,
)

#: The content of an optimizer's slot: linear in past gradients, averages of squared gradients, or
#: an average of the weight.
LINEAR, SQUARED, AVERAGE = "linear", "squared", "average"

#: The same by optimizer class and slot name, in Keras 3, tf_keras and tf_keras's legacy optimizers.
#: Slots that cannot be converted are missing: RMSprop's momentum, which sums rescaled gradients;
#: its average gradient, whose square is subtracted from the averaged squares; slots of a maximum.
_SLOTS: dict[str, dict[str, str]] = {
    "SGD": dict.fromkeys(("momentums", "momentum"), LINEAR),
    "Adam": {
        **dict.fromkeys(("_momentums", "m"), LINEAR),
        **dict.fromkeys(("_velocities", "_velocity_hats", "v", "vhat"), SQUARED),
    },
    "Adamax": dict.fromkeys(("_m", "m"), LINEAR),
    "Lion": {"_momentums": LINEAR, "momentums": LINEAR},
    "RMSprop": dict.fromkeys(("_velocities", "rms"), SQUARED),
    "Adagrad": dict.fromkeys(("_accumulators", "accumulator"), SQUARED),
    "Adadelta": dict.fromkeys(("_accumulated_grads", "accum_grad"), SQUARED),
}
_SLOTS["Nadam"] = _SLOTS["Adam"]
_ANY = {"_accumulated_gradients": LINEAR, "_model_variables_moving_average": AVERAGE}


def slot_meaning(optimizer: Optimizer, slot: str) -> str | None:
    """The content of an optimizer's slot: `LINEAR`, `SQUARED`, `AVERAGE`, or None for others."""
    if slot in _ANY:
        return _ANY[slot]
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _SLOTS:
            return _SLOTS[cls.__name__].get(slot)
    return None


class Callback(keras.callbacks.Callback):
    """A callback without hooks for batches, for `fit` of Keras 3 and tf_keras."""

    # tf_keras calls this for every callback.
    def _implements_train_batch_hooks(self) -> bool:
        return False

    _implements_test_batch_hooks = _implements_train_batch_hooks
    _implements_predict_batch_hooks = _implements_train_batch_hooks


class Training(Layers):
    """Training: the code that Keras 3 and tf_keras share."""

    def is_compiled(self, model: Model) -> bool:
        """Whether `compile()` was called on `model`."""
        raise NotImplementedError

    def optimizers(self, model: Model) -> list[Optimizer]:
        """Every optimizer of `model`: its own and those of a custom `train_step`."""
        base = self.optimizer_classes()
        found: dict[Optimizer, None] = {}

        def visit(value: Any, depth: int = 0) -> None:
            if isinstance(value, base):
                found.setdefault(value)
                for inner in self.inner_optimizers(value):
                    found.setdefault(inner)
            elif depth < 2 and isinstance(value, dict):
                for item in value.values():
                    visit(item, depth + 1)
            elif depth < 2 and isinstance(value, (list, tuple)):
                for item in value:
                    visit(item, depth + 1)

        visit(getattr(model, "optimizer", None))
        for value in list(vars(model).values()):
            visit(value)
        return list(found)

    def optimizer_classes(self) -> tuple[type, ...]:
        """The classes of all optimizers."""
        raise NotImplementedError

    def inner_optimizer(self, optimizer: Optimizer) -> Optimizer | None:
        """The optimizer that a `LossScaleOptimizer` wraps, or None."""
        raise NotImplementedError

    def inner_optimizers(self, optimizer: Optimizer) -> list[Optimizer]:
        """The optimizers that a `LossScaleOptimizer` or a `MultiOptimizer` wraps."""
        inner = self.inner_optimizer(optimizer)
        return [] if inner is None else [inner]

    def assign_like(
        self,
        optimizer: Optimizer,
        variable: Variable,
        others: list[Variable],
        source: Optimizer | None = None,
    ) -> Undo:
        """Assigns other variables to the optimizer in a `MultiOptimizer` that has `variable`.

        Only a map of paths is changed. A function of the user's chooses for every variable.

        Args:
            optimizer: An optimizer; only a `MultiOptimizer` changes.
            variable: A variable.
            others: The other variables.
            source: The `MultiOptimizer` that has `variable`, of which `optimizer` is a copy.
                Defaults to `optimizer`.

        Returns:
            A function that undoes the change.
        """
        return lambda: None

    def is_optimizer_built(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` has created its variables."""
        raise NotImplementedError

    def optimizer_targets(
        self, optimizer: Optimizer, known: list[Variable]
    ) -> list[Variable | None]:
        """The variables that a built optimizer was built for, in order; None if not among `known`.

        Args:
            optimizer: A built optimizer.
            known: All variables that it may have been built for, as tf_keras's optimizers keep
                only keys of them.
        """
        raise NotImplementedError

    def slots(
        self, optimizer: Optimizer, targets: list[Variable]
    ) -> dict[str, list[Variable | None]]:
        """The optimizer's per-variable state: slot name to one variable per target.

        Optimizers keep it in a list, and those that users write often in a dictionary.
        """
        # `iterations` is listed among the variables, but is not a slot.
        state = {id(v) for v in optimizer.variables if v is not optimizer.iterations}
        found = {}
        for name, value in vars(optimizer).items():
            if name == "_variables":  # all of them, which may be as many
                continue
            if isinstance(value, list) and len(value) == len(targets):
                slot = value
            elif isinstance(value, dict) and value:
                slot = _by_target(value, targets, optimizer)
            else:
                continue
            # Adafactor has numbers where a variable has no state.
            slot = [None if _is_number(item) and id(item) not in state else item for item in slot]
            if any(id(item) in state for item in slot) and all(
                item is None or id(item) in state for item in slot
            ):
                found[name] = slot
        return found

    def other_state(
        self, optimizer: Optimizer, slots: dict[str, list[Variable | None]]
    ) -> list[Variable]:
        """Arrays among the optimizer's own variables that are in none of its `slots`."""
        if self.inner_optimizers(optimizer):  # which have the state
            return []
        known = {id(v) for slot in slots.values() for v in slot}
        return [v for v in optimizer.variables if len(v.shape) and id(v) not in known]

    def rebuild_optimizer(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        """Rebuilds `optimizer` in place for other model variables.

        Its per-variable state starts at the initial values. Iterations, learning rate, schedule
        and all scalars, such as the loss scale, are kept.

        Args:
            optimizer: A built optimizer.
            old: The model variables that it was built for.
            new: The model variables to update from now on.
            undo_steps: A list to which a function that undoes the change is appended first.
        """
        raise NotImplementedError

    def learning_rate(self, optimizer: Optimizer) -> float:
        """The learning rate of the next step."""
        rate = (self.inner_optimizer(optimizer) or optimizer).learning_rate
        return float(tf.convert_to_tensor(rate))  # also that of several replicas

    def set_learning_rate(self, optimizer: Optimizer, rate: float) -> None:
        """Sets a constant learning rate of an unbuilt optimizer, replacing any schedule."""
        raise NotImplementedError

    def is_excluded_from_weight_decay(self, optimizer: Optimizer, variable: Variable) -> bool:
        """Whether `exclude_from_weight_decay(var_list=…)` excluded this variable."""
        excluded = getattr(optimizer, "_exclude_from_weight_decay", ())
        return bool(excluded) and optimizer._var_key(variable) in excluded

    def exclude_from_weight_decay(self, optimizer: Optimizer, variables: list[Variable]) -> Undo:
        """Excludes more variables from weight decay, even if the optimizer is built.

        Returns:
            A function that undoes the change.
        """
        known = getattr(optimizer, "_exclude_from_weight_decay", ())
        optimizer._exclude_from_weight_decay = [*known, *map(optimizer._var_key, variables)]
        return lambda: setattr(optimizer, "_exclude_from_weight_decay", known)

    def calling_fit(self, model: Model) -> tuple[Any, list[Any]]:
        """The data and the callbacks of the running `fit` call of `model`.

        They are found on the call stack: Keras passes a callback only its model.

        Returns:
            `x`, or None outside of `fit`, and the list of all callbacks of `fit`.
        """
        x, callbacks = None, None
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if x is None and owner is model and frame.f_code.co_name == "fit":
                x = frame.f_locals.get("x")
            if callbacks is None and isinstance(owner, self.keras.callbacks.CallbackList):
                callbacks = owner.callbacks
            frame = frame.f_back
        return x, list(callbacks or [])

    def hide_logs(self, callback: Any, names: Collection[str], hidden: Callable[[], bool]) -> None:
        """Leaves logs out of the line that Keras prints after an epoch.

        All other callbacks still see them.

        Args:
            callback: Any callback; only Keras's `ProgbarLogger` is changed.
            names: The names of the logs.
            hidden: Whether to leave them out now.
        """
        if not isinstance(callback, self.keras.callbacks.ProgbarLogger):
            return
        show = functools.partial(type(callback).on_epoch_end, callback)  # not an earlier `fit`'s

        def on_epoch_end(epoch: int, logs: dict[str, Any] | None = None) -> None:
            left_out = names if hidden() else ()
            show(epoch, {k: v for k, v in (logs or {}).items() if k not in left_out})

        callback.on_epoch_end = on_epoch_end

    def board_folder(self, callback: Any) -> str | None:
        """Where a `TensorBoard` callback writes; None for any other one."""
        is_board = isinstance(callback, self.keras.callbacks.TensorBoard)
        return str(callback.log_dir) if is_board else None

    def threshold(self, callback: Any) -> float | None:
        """The value that an unused `ModelCheckpoint` wants to be exceeded, if it has one."""
        stock = self.keras.callbacks.ModelCheckpoint
        if not isinstance(callback, stock) or hasattr(callback, "_current_epoch"):
            return None
        best = callback.best
        return None if best is None or np.isinf(best) else float(best)

    def forget_best(self, callback: Any, threshold: float | None) -> None:
        """Resets the best value and weights that a stock callback remembers.

        Args:
            callback: Any callback.
            threshold: Its `threshold` when training began.
        """
        callbacks = self.keras.callbacks
        for stock in (callbacks.EarlyStopping, callbacks.ReduceLROnPlateau):
            if isinstance(callback, stock):
                stock.on_train_begin(callback)  # a subclass may do more there
        if isinstance(callback, callbacks.ModelCheckpoint) and callback.save_best_only:
            self._forget_checkpoint(callback)
            if threshold is not None:
                callback.best = threshold

    def own_attributes(self, callback: Any) -> list[tuple[str, Any]]:
        """What a user's callback keeps, without what `forget_best` resets.

        It is empty for the callbacks of Keras and of this package.
        """
        if type(callback).__module__.partition(".")[0] == self.name:
            return []
        if isinstance(callback, Callback):
            return []
        reset = isinstance(callback, self.keras.callbacks.EarlyStopping)
        return [
            (name, value)
            for name, value in getattr(callback, "__dict__", {}).items()
            if not (reset and name == "best_weights")
        ]

    def _forget_checkpoint(self, callback: Any) -> None:
        raise NotImplementedError


class Keras3Training(Training):
    """The implementation for Keras 3."""

    def is_compiled(self, model: Model) -> bool:
        return bool(model.compiled)

    def optimizer_classes(self) -> tuple[type, ...]:
        return (keras.optimizers.Optimizer,)

    def inner_optimizer(self, optimizer: Optimizer) -> Optimizer | None:
        return getattr(optimizer, "inner_optimizer", None)

    def inner_optimizers(self, optimizer: Optimizer) -> list[Optimizer]:
        if is_multi_optimizer(optimizer):
            return list(optimizer.optimizers)
        return super().inner_optimizers(optimizer)

    def assign_like(
        self,
        optimizer: Optimizer,
        variable: Variable,
        others: list[Variable],
        source: Optimizer | None = None,
    ) -> Undo:
        source = optimizer if source is None else source
        if not is_multi_optimizer(optimizer) or not has_optimizer_map(optimizer):
            return super().assign_like(optimizer, variable, others, source)
        paths = optimizer._optimizer_map
        place = source.optimizers.index(source._optimizer_map(variable))
        before, assigned = paths._optimizer_map, optimizer.optimizers[place]
        new = {other.path: assigned for other in others if paths(other) is not assigned}
        paths._optimizer_map = {**before, **new}
        return lambda: setattr(paths, "_optimizer_map", before)

    def is_optimizer_built(self, optimizer: Optimizer) -> bool:
        return bool(optimizer.built)

    def optimizer_targets(
        self, optimizer: Optimizer, known: list[Variable]
    ) -> list[Variable | None]:
        return list(optimizer._trainable_variables)

    def rebuild_optimizer(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        tracker = optimizer._tracker
        restore, config, ids = remember(optimizer), tracker.config, tracker.stored_ids

        def undo() -> None:
            restore()
            tracker.config, tracker.stored_ids = config, ids

        undo_steps.append(undo)
        wrapper = bool(self.inner_optimizers(optimizer))
        dropped = {id(v) for slot in self.slots(optimizer, old).values() for v in slot}
        # Scalars that `build` creates again (loss scale, step counters, …) keep their values.
        scalars = {
            name: value
            for name, value in vars(optimizer).items()
            if isinstance(value, keras.Variable) and tuple(value.shape) == ()
        }
        _track(optimizer, [v for v in optimizer._variables if id(v) not in dropped])
        optimizer._trainable_variables_indices = {}
        if wrapper:
            # Their own `build` would create new counters and build the inner optimizers again.
            keras.optimizers.Optimizer.build(optimizer, new)
            if is_multi_optimizer(optimizer):
                optimizer._var_to_optimizer_idx = {
                    optimizer._var_key(variable): index
                    for index, inner in enumerate(optimizer.optimizers)
                    for variable in inner._trainable_variables
                }
        else:
            optimizer.built = False
            optimizer.build(new)
            made = {name: getattr(optimizer, name) for name in scalars}
            again = [name for name, value in scalars.items() if made[name] is not value]
            for name in again:
                made[name].assign(scalars[name])
            dropped = {id(scalars[name]) for name in again}
            _track(optimizer, [v for v in optimizer._variables if id(v) not in dropped])

    def _forget_checkpoint(self, callback: Any) -> None:
        new = keras.callbacks.ModelCheckpoint("best.keras", save_best_only=True)
        worst = np.inf if callback.monitor_op is np.less else -np.inf
        callback.best = None if new.best is None else worst  # numbers before Keras 3.9


class TfKerasTraining(Training):
    """The implementation for tf_keras, including its `legacy` optimizers from before 2.11."""

    def is_compiled(self, model: Model) -> bool:
        return model.compiled_loss is not None

    def optimizer_classes(self) -> tuple[type, ...]:
        optimizers = self.keras.optimizers
        return (optimizers.Optimizer, optimizers.legacy.Optimizer)

    def _is_legacy(self, optimizer: Optimizer) -> bool:
        return isinstance(optimizer, self.keras.optimizers.legacy.Optimizer)

    def inner_optimizer(self, optimizer: Optimizer) -> Optimizer | None:
        if hasattr(type(optimizer), "inner_optimizer"):
            return optimizer.inner_optimizer
        return None

    def is_optimizer_built(self, optimizer: Optimizer) -> bool:
        if self.inner_optimizer(optimizer) is not None:
            return False  # the per-variable state is in the inner optimizer
        if self._is_legacy(optimizer):
            return len(optimizer.weights) > 1  # the first is `iterations`
        return bool(getattr(optimizer, "_built", False))

    def optimizer_targets(
        self, optimizer: Optimizer, known: list[Variable]
    ) -> list[Variable | None]:
        if self._is_legacy(optimizer):
            names = optimizer.get_slot_names()
            return [
                v for v in known if any(_legacy_slot(optimizer, v, n) is not None for n in names)
            ]
        by_key = {optimizer._var_key(v): v for v in known}
        return [by_key.get(k) for k in sorted(optimizer._index_dict, key=optimizer._index_dict.get)]

    def slots(
        self, optimizer: Optimizer, targets: list[Variable]
    ) -> dict[str, list[Variable | None]]:
        if not self._is_legacy(optimizer):
            return super().slots(optimizer, targets)
        return {
            name: [_legacy_slot(optimizer, v, name) for v in targets]
            for name in optimizer.get_slot_names()
        }

    def other_state(
        self, optimizer: Optimizer, slots: dict[str, list[Variable | None]]
    ) -> list[Variable]:
        return [] if self._is_legacy(optimizer) else super().other_state(optimizer, slots)

    def learning_rate(self, optimizer: Optimizer) -> float:
        inner = self.inner_optimizer(optimizer) or optimizer
        # With a schedule, `learning_rate` is the rate of the optimizer's last step.
        rate = getattr(inner, "_learning_rate", inner.learning_rate)
        return float(tf.convert_to_tensor(rate(inner.iterations) if callable(rate) else rate))

    def set_learning_rate(self, optimizer: Optimizer, rate: float) -> None:
        inner = self.inner_optimizer(optimizer) or optimizer
        if self._is_legacy(inner):
            inner.learning_rate = rate
        else:
            inner._learning_rate = inner._build_learning_rate(rate)

    def rebuild_optimizer(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        if self._is_legacy(optimizer):
            return self._rebuild_legacy(optimizer, old, new, undo_steps)
        undo_steps.append(remember(optimizer))
        forget_children(optimizer)
        dropped = {id(v) for slot in self.slots(optimizer, old).values() for v in slot}
        scalars = {
            name: value
            for name, value in vars(optimizer).items()
            if isinstance(value, tf.Variable) and value.shape.rank == 0
        }
        optimizer._variables = [v for v in optimizer._variables if id(v) not in dropped]
        optimizer._built = False
        optimizer.build(new)
        for name, value in scalars.items():
            if getattr(optimizer, name) is not value:
                getattr(optimizer, name).assign(value)

    def _rebuild_legacy(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        slots, weights = dict(optimizer._slots), list(optimizer.weights)

        def undo() -> None:
            optimizer._slots.clear()
            optimizer._slots.update(slots)
            optimizer.weights[:] = weights

        undo_steps.append(undo)
        # All slots are created again: a loaded model reads its state by their order.
        dropped = {id(v) for slot in self.slots(optimizer, old).values() for v in slot}
        for key, by_name in slots.items():
            if any(id(v) in dropped for v in by_name.values()):
                del optimizer._slots[key]
        optimizer.weights[:] = [w for w in weights if id(w) not in dropped]
        optimizer._create_all_weights(new)

    def _forget_checkpoint(self, callback: Any) -> None:
        callback.best = np.inf if callback.monitor_op is np.less else -np.inf


def is_multi_optimizer(optimizer: Optimizer) -> bool:
    """Whether it is a `MultiOptimizer`, which newer versions of Keras 3 have."""
    cls = getattr(keras.optimizers, "MultiOptimizer", None)
    return cls is not None and isinstance(optimizer, cls)


def _by_target(
    by_key: dict[Any, Any], targets: Sequence[Variable | None], optimizer: Optimizer
) -> list[Any]:
    """The values of a dictionary by target, whatever of a variable its keys are."""
    keys: list[Callable[[int, Any], Any]] = [
        lambda _, variable: optimizer._var_key(variable),
        lambda _, variable: getattr(variable, "path", None),
        lambda _, variable: variable.name,
        lambda _, variable: id(variable),
        lambda number, _: number,
    ]
    for key in keys:
        found = [
            None if target is None else by_key.get(key(number, target))
            for number, target in enumerate(targets)
        ]
        if sum(item is not None for item in found) == len(by_key):
            return found
    return []


def _is_number(item: Any) -> bool:
    return isinstance(item, (tf.Variable, keras.Variable)) and len(item.shape) == 0


def has_optimizer_map(optimizer: Optimizer) -> bool:
    """Whether a `MultiOptimizer` chooses by a map of paths, not by a function of the user's."""
    return isinstance(optimizer._optimizer_map, keras.optimizers.OptimizerMap)


def remember(obj: Any) -> Undo:
    """A function that restores the current attributes of an object.

    TensorFlow's tracking attributes are copied, because every assignment changes them in place.
    """
    before = {
        name: copy.copy(value) if name.startswith("_self_") else value
        for name, value in vars(obj).items()
    }
    return lambda: become(obj, type(obj), before)


def _track(optimizer: Optimizer, variables: list[Variable]) -> None:
    """Replaces the list of an optimizer's variables by a new one.

    TensorFlow cannot save a tracked list from which items were removed, and Keras would wrap an
    assigned list in its own class.
    """
    stored = tf.__internal__.tracking.wrap(variables)
    optimizer.__dict__["_variables"] = stored
    optimizer._track_trackable(stored, "_variables", overwrite=True)
    tracker = optimizer._tracker
    accepts, _ = tracker.config["variables"]
    tracker.config = {**tracker.config, "variables": (accepts, stored)}
    tracker.stored_ids = {**tracker.stored_ids, "variables": set(map(id, variables))}


def forget_children(optimizer: Optimizer) -> None:
    # TensorFlow caches the variables of an optimizer's first checkpoint for later ones.
    optimizer.__dict__.pop("_coalesced_children", None)


def _legacy_slot(optimizer: Optimizer, variable: Variable, name: str) -> Variable | None:
    try:
        return optimizer.get_slot(variable, name)
    except KeyError:
        return None


def repeatable(module: Any) -> None:
    """Lets the next training with Keras 3 or tf_keras in this process give the same each time."""
    module.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
