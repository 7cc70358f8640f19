"""`ALDSCompress`: compression inside `model.fit`."""

from __future__ import annotations

import numbers
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.compress import select_with, wants_data
from keras_alds.core.methods import METHODS, choose_method, get_method
from keras_alds.options import Options, check_cr_or_plan
from keras_alds.plan import CompressionPlan, removed_fraction
from keras_alds.problem import Problem, check_model
from keras_alds.rewrite import inspect
from keras_alds.rewrite.in_place import (
    apply_calibrated,
    check_folded,
    check_sequential,
    match,
)
from keras_alds.rewrite.observe import check_data


class ALDSCompress(_backend.Callback):
    """Compresses the model that is being trained, and lets its training go on.

    Before epoch index `at_epoch` (counted from 0) starts, slices and ranks are chosen for the
    weights of that moment, and the layers are factorized **in place**: the model, its layers and
    their names stay the same objects. The callback works in `fit` of Keras 3 and of tf_keras.

    What carries on in every optimizer of the model: `iterations`, the learning rate and its
    schedule, the loss scale, and all state of the variables that stay (biases and
    BatchNormalization included). For a factorized kernel W ≈ E D, state that is linear in past
    gradients G (momentum, first moments, accumulated gradients) becomes that of the factors by
    the chain rule, G Dᵀ and Eᵀ G; second moments by the squared factors, their expectation for
    uncorrelated gradients; averages of weights (EMA) start at the factors. This is done for SGD,
    Adam, AdamW, Adamax, Nadam, Lion, RMSprop, Adagrad and Adadelta; whatever else an optimizer
    keeps for a factor (RMSprop's momentum, Adamax's norm, the state of other optimizers) starts
    at its initial value.

    What other callbacks remember of the dense model is forgotten at that moment: the best value
    and weights of `EarlyStopping`, the best value of `ModelCheckpoint(save_best_only=True)`,
    whose file then becomes the best *compressed* model, and the waiting of `ReduceLROnPlateau`.
    `BackupAndRestore` cannot resume across the compression: a restart whose backup holds the other
    structure is refused before the first step. To resume after it, factorize the model first, with
    `apply_plan` and the plan that was saved.

    Every epoch's `logs`, and so the history, get `alds_cr`, the fraction of parameters removed so
    far, and `alds_params`, the number of parameters.

    If training starts after `at_epoch` (`initial_epoch`), a model that is not compressed yet is
    compressed before its first epoch; one that is, is trained on as it is.

    Args:
        cr: Float, 0 < cr < 1, or a dict of two. The fraction to remove; see `select`.
        at_epoch: Integer >= 0. Index of the epoch before which to compress, as in
            `initial_epoch`.
        method: As for `select`. Defaults to None: `"activation"` with `calibration_data`, else
            `"energy"`.
        objective: As for `select`.
        error: As for `select`.
        calibration_data: As for `select`; it is run through the model at `at_epoch`, with the
            weights of that moment. Defaults to None: with `method="activation"`, or a plan that
            was chosen by it, up to 1024 examples of the `x` that `fit` was given are taken (of
            arrays evenly spaced ones; a data set or PyDataset is begun once more). A generator in
            `fit` cannot be begun again and is refused: pass examples here then.
        exclude: As for `select`.
        max_slices: As for `select`.
        rank_multiple: As for `select`.
        target: As for `select`.
        bounds: As for `select`.
        latency: As for `select`; what is not given is measured when training starts.
        schemes: As for `select`.
        plan: A `CompressionPlan` to apply instead of selecting one; then `cr` is to be None.
        sequential: As for `compress`.
        verbose: 0 for silence, else one line is printed at the compression. Defaults to 1.

    Attributes:
        plan: The `CompressionPlan`, once the model is compressed.

    Raises:
        ValueError: From the constructor for a bad argument; from `fit`, before anything is
            changed, for a model that cannot be compressed (see `select`): when training starts,
            for what does not depend on the weights, else at `at_epoch`; and when training starts,
            for a backup of `BackupAndRestore` that does not fit the model.

    Example:
    ```python
    model.fit(x, y, epochs=120, callbacks=[keras_alds.ALDSCompress(cr=0.5, at_epoch=80)])
    ```

    References:
        Liebenwein et al., NeurIPS 2021, arXiv:2107.11442, section 3: train, compress, retrain.
    """

    plan: CompressionPlan | None
    at_epoch: int
    verbose: int
    _calibration_data: Any
    _sequential: bool | None
    _source: Options | CompressionPlan
    _done: bool
    _started: bool
    _params_before: int | None
    _watched: list[tuple[Any, np.ndarray]]

    def __init__(
        self,
        cr: float | Mapping[str, float] | None = None,
        at_epoch: int = 0,
        *,
        method: str | None = None,
        objective: str = "params",
        error: str | None = None,
        calibration_data: Any = None,
        exclude: Any = (),
        max_slices: int | None = None,
        rank_multiple: int = 1,
        target: str | None = None,
        bounds: Mapping[Any, tuple[float | None, float | None]] | None = None,
        latency: Any = None,
        schemes: int | str | Sequence[int] = 0,
        plan: CompressionPlan | None = None,
        sequential: bool | None = None,
        verbose: int = 1,
    ) -> None:
        super().__init__()
        check_cr_or_plan(
            cr,
            plan,
            method=method,
            objective=objective,
            error=error,
            exclude=exclude,
            max_slices=max_slices,
            rank_multiple=rank_multiple,
            target=target,
            bounds=bounds,
            latency=latency,
            schemes=schemes,
        )
        if isinstance(at_epoch, bool) or not isinstance(at_epoch, numbers.Integral) or at_epoch < 0:
            raise ValueError(
                "Expected `at_epoch`, the index of an epoch, to be an integer >= 0. "
                f"Received: at_epoch={at_epoch!r}"
            )
        if calibration_data is not None or method not in METHODS or not METHODS[method].needs_data:
            method = choose_method(method, has_data=calibration_data is not None, error=error)
        self._source = (
            Options(
                cr,
                method,
                objective,
                error,
                exclude,
                max_slices,
                rank_multiple,
                target,
                bounds,
                latency=latency,
                schemes=schemes,
            )
            if plan is None
            else plan
        )
        if plan is not None:
            check_folded(plan, calibration_data)
        # Without data here those of `fit` come, if the method uses some.
        data = () if calibration_data is None and self._needs_data else calibration_data
        check_sequential(sequential, data, self._source.method)
        self._calibration_data = calibration_data
        self._sequential = sequential
        self.at_epoch = int(at_epoch)
        self.verbose = verbose
        self.plan = None
        self._done = False
        self._started = False
        self._params_before = None
        self._watched = []

    def set_model(self, model: Any) -> None:
        """Refuses a backup of the other structure, before any callback restores it."""
        super().set_model(model)
        for callback in self._siblings():
            missing = _backend.backend_of(model).missing_in_backup(callback, model)
            if missing is not None:
                raise ValueError(self._other_backup(callback, missing))

    def _other_backup(self, callback: Any, missing: str) -> str:
        state = "not compressed"
        remedy = (
            "factorize the model with `apply_plan(model, plan)` before `fit`; that takes the plan, "
            "saved in the first run with `callback.plan.save(path)`"
        )
        if self._factorized_layers():
            state, remedy = "compressed", "start with the model as it was before its compression"
        return (
            f"Expected the backup that `BackupAndRestore` would restore to fit the model "
            f"'{self.model.name}', which is {state}. Received: backup_dir="
            f"{os.fspath(callback.backup_dir)!r}, without {missing}. To resume, {remedy}. To begin "
            "anew, delete the folder."
        )

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Raises what can be known to be wrong before the first epoch."""
        self._done = False
        self._started = False
        self._watched = []
        if self._calibration_data is not None or self._needs_forward:
            _backend.backend_of(self.model).check_call(self.model)
        ready = inspect.has_weights(self.model)
        self._params_before = inspect.dense_params(self.model) if ready else None
        if ready and not self._factorized_layers():
            self._check()
            if self._calibration_data is not None:
                check_data(self.model, self._calibration_data)
        if self._needs_data and self._calibration_data is None:
            self._training_inputs()

    def _check(self) -> None:
        if isinstance(self._source, CompressionPlan):
            match(self.model, self._source)
        else:
            Problem.of(self.model, self._source, verbose=self.verbose)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Compresses the model if it is time."""
        resumed = not self._started and epoch > self.at_epoch
        if not self._started and not resumed and self._factorized_layers():
            self._check()  # tells now that the model is compressed already
        self._started = True
        if self._done or epoch < self.at_epoch:
            return
        if resumed and self._factorized_layers():
            self._done = True
            self._say(f"epoch {epoch}: the model is compressed already, training goes on")
            return
        self._compress(epoch)

    def _compress(self, epoch: int) -> None:
        start = time.perf_counter()
        model = self.model
        check_model(model)
        data = self._calibration_data
        if data is None and self._needs_data:
            data = self._training_inputs()
        if isinstance(self._source, CompressionPlan):
            plan = self._source
            match(model, plan)
        else:
            keep = self._sequential is not False
            plan, data = select_with(model, self._source, data, keep=keep, verbose=self.verbose)
        self._params_before = inspect.dense_params(model)
        apply_calibrated(model, plan, data, self._sequential, last=True, verbose=self.verbose)
        self.plan, self._done = plan, True
        backend = _backend.backend_of(model)
        for callback in self._siblings():
            backend.forget_best(callback)
        layers = [layer for layer in self._factorized_layers() if layer.trainable]
        self._watched = [(layer.decoder, backend.value(layer.decoder)) for layer in layers]
        self._say(
            f"epoch {epoch}: {self._params_before:,} → {inspect.count_params(model):,} parameters "
            f"(cr={self._cr():.4f}), {len(plan.factorized)} layers factorized in "
            f"{time.perf_counter() - start:.1f} s"
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds `alds_cr` and `alds_params` to the logs."""
        if logs is not None:
            logs["alds_cr"] = self._cr()
            logs["alds_params"] = inspect.count_params(self.model)
        if self._watched:
            value = _backend.backend_of(self.model).value
            if all(np.array_equal(value(variable), old) for variable, old in self._watched):
                warnings.warn(
                    "No factor has moved in the first epoch after the compression. If the learning "
                    "rate is not zero, then something still runs a graph of the dense model: a "
                    "`tf.function` that is no method of the model or of its layers. Let Keras wrap "
                    "`train_step`.",
                    stacklevel=2,
                )
            self._watched = []

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Warns if the training ended before `at_epoch`."""
        if not self._done:
            warnings.warn(
                f"The model was not compressed: training ended before epoch index "
                f"at_epoch={self.at_epoch} (epochs are counted from 0). Received: "
                f"epochs={self.params.get('epochs')}",
                stacklevel=2,
            )

    def _cr(self) -> float:
        before = self._params_before
        return removed_fraction(before, inspect.count_params(self.model)) if before else 0.0

    def _factorized_layers(self) -> list[Any]:
        return [layer for _, layer in inspect.walk(self.model) if inspect.is_factorized(layer)]

    def _say(self, line: str) -> None:
        if self.verbose:
            print(f"ALDSCompress: {line}")

    @property
    def _needs_data(self) -> bool:
        if isinstance(self._source, CompressionPlan):
            return wants_data(self._source)
        return get_method(self._source.method).needs_data

    @property
    def _needs_forward(self) -> bool:
        if isinstance(self._source, CompressionPlan):
            return self._needs_data
        counted = self._source.objective != "params" or self._source.macs_cr is not None
        return self._needs_data or counted

    def _training_inputs(self) -> Any:
        """The `x` of the `fit` that is calling."""
        x, _ = _backend.backend_of(self.model).calling_fit(self.model)
        if x is None or hasattr(x, "__next__"):
            raise ValueError(
                "Expected `calibration_data`, or training data that can be read twice (arrays, a "
                "tf.data.Dataset or a PyDataset) to take examples from. "
                f"Received: calibration_data=None and x of type {type(x).__name__}"
            )
        return x

    def _siblings(self) -> list[Any]:
        """The callbacks that run beside this one."""
        _, callbacks = _backend.backend_of(self.model).calling_fit(self.model)
        return [callback for callback in callbacks if callback is not self]
