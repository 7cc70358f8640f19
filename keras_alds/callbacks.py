"""`ALDSCompress`: compression inside `model.fit`."""

from __future__ import annotations

import numbers
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_alds import _backend
from keras_alds.api import Chosen, checked_options, choose, selection_of, wants_data
from keras_alds.kinds.base import is_factorized
from keras_alds.methods import METHODS
from keras_alds.models.calibration import Calibration, check_data
from keras_alds.models.in_place import apply, check_folded, check_sequential
from keras_alds.models.inventory import (
    Inventory,
    check_model,
    count_params,
    dense_params,
    has_weights,
    walk,
)
from keras_alds.models.matching import match
from keras_alds.options import (
    Options,
    SelectOptions,
    check_cr_or_plan,
    documented,
    takes_options,
)
from keras_alds.plan import CompressionPlan, removed_fraction

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ALDSCompress(_backend.Callback):
    """Compresses the model that is being trained, and lets its training go on.

    Before epoch index `at_epoch` (counted from 0) starts, slices and ranks are chosen for the
    weights of that moment, and the layers are factorized **in place**: the model, its layers and
    their names stay the same objects. The callback works in `fit` of Keras 3 and of tf_keras.

    What carries on in every optimizer of the model: `iterations`, the learning rate and its
    schedule, the loss scale, and all state of the variables that stay (biases and
    BatchNormalization included). For a factorized kernel W ≈ E D, state that is linear in past
    gradients G (momentum, first moments, accumulated gradients) becomes that of the factors by
    the chain rule, G Dᵀ and Eᵀ G. Second moments follow by the squared factors, their expectation
    for uncorrelated gradients; averages of weights (EMA) start at the factors. This is done for
    SGD, Adam, AdamW, Adamax, Nadam, Lion, RMSprop, Adagrad and Adadelta. Whatever else an optimizer
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
    compressed before its first epoch. One that is compressed is trained on as it is.

    Args:
        cr: Float, 0 < cr < 1, or a dict of two. The fraction to remove; see `select`.
        at_epoch: Integer >= 0. Index of the epoch before which to compress, as in
            `initial_epoch`. 0 compresses the weights that `fit` starts with: right for a trained
            model, wrong for a new one.
        plan: A `CompressionPlan` to apply instead of selecting one; then `cr` is to be None.
        calibration_data: As for `select`; it is run through the model at `at_epoch`, with the
            weights of that moment. Defaults to None: with `method="activation"`, or a plan that
            was chosen by it, up to 1024 examples of the `x` that `fit` was given are taken (of
            arrays evenly spaced ones; a data set or PyDataset is begun once more). A generator in
            `fit` cannot be begun again and is refused: pass examples here then.
        sequential: As for `compress`.
        callbacks: The callbacks that run beside this one. Defaults to None: they are looked for in
            the `fit` that is running.
        verbose: 0 for silence, else one line is printed at the compression. Defaults to 1.
        {options}

    Attributes:
        plan: The `CompressionPlan`, once the model is compressed.

    Raises:
        TypeError: From the constructor, without `at_epoch` or for an option of another name.
        ValueError: From the constructor for a bad argument. From `fit`, before anything is
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
    _source: Options | CompressionPlan
    _calibration_data: Any
    _sequential: bool | None
    _callbacks: Sequence[Any] | None

    @takes_options()
    def __init__(
        self,
        cr: float | Mapping[str, float] | None = None,
        *,
        at_epoch: int,
        plan: CompressionPlan | None = None,
        calibration_data: Any = None,
        sequential: bool | None = None,
        callbacks: Sequence[Any] | None = None,
        verbose: int = 1,
        **options: Unpack[SelectOptions],
    ) -> None:
        super().__init__()
        check_cr_or_plan(cr, plan, options, "ALDSCompress")
        if isinstance(at_epoch, bool) or not isinstance(at_epoch, numbers.Integral) or at_epoch < 0:
            raise ValueError(
                "Expected `at_epoch`, the index of an epoch, to be an integer >= 0. "
                f"Received: at_epoch={at_epoch!r}"
            )
        if plan is None:
            # Without data here those of `fit` come, if the method uses some.
            named = METHODS.get(str(options.get("method")))
            has_data = calibration_data is not None or (named is not None and named.needs_data)
            self._source = checked_options(cr, options, has_data=has_data, caller="ALDSCompress")
        else:
            check_folded(plan, calibration_data)
            self._source = plan
        data = () if calibration_data is None and self._needs_data else calibration_data
        check_sequential(sequential, data, self._source.method)
        self._calibration_data = calibration_data
        self._sequential = sequential
        self._callbacks = callbacks
        self.at_epoch = int(at_epoch)
        self.verbose = verbose
        self.plan = None
        self._start_training()

    def _start_training(self) -> None:
        self._done = False
        self._started = False
        self._params_before: int | None = None
        self._watched: list[tuple[Any, np.ndarray]] = []

    # -- What Keras calls --------------------------------------------------------------------

    def set_model(self, model: Any) -> None:
        """Refuses a backup of the other structure, before any callback restores it."""
        super().set_model(model)
        for callback in self._siblings():
            missing = _backend.backend_of(model).missing_in_backup(callback, model)
            if missing is not None:
                raise ValueError(self._other_backup(callback, missing))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Raises what can be known to be wrong before the first epoch."""
        self._start_training()
        if self._calibration_data is not None or self._needs_forward:
            _backend.backend_of(self.model).check_call(self.model)
        if has_weights(self.model):
            self._params_before = dense_params(self.model)
            if not self._factorized_layers():
                inventory = self._check()
                if self._calibration_data is not None:
                    check_data(inventory, self._calibration_data)
        if self._needs_data and self._calibration_data is None:
            self._training_inputs()

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

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds `alds_cr` and `alds_params` to the logs."""
        if logs is not None:
            logs["alds_cr"] = self._cr()
            logs["alds_params"] = count_params(self.model)
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

    # -- The compression ---------------------------------------------------------------------

    def _compress(self, epoch: int) -> None:
        start = time.perf_counter()
        check_model(self.model)
        self._params_before = dense_params(self.model)
        chosen = self._choose()
        apply(
            chosen.inventory,
            chosen.plan,
            chosen.calibration,
            self._sequential,
            last=True,
            verbose=self.verbose,
            stacklevel=3,
        )
        self.plan, self._done = chosen.plan, True
        backend = chosen.inventory.backend
        for callback in self._siblings():
            backend.forget_best(callback)
        layers = [layer for layer in self._factorized_layers() if layer.trainable]
        self._watched = [(layer.decoder, backend.value(layer.decoder)) for layer in layers]
        self._say(
            f"epoch {epoch}: {self._params_before:,} → {count_params(self.model):,} parameters "
            f"(cr={self._cr():.4f}), {len(chosen.plan.factorized)} layers factorized in "
            f"{time.perf_counter() - start:.1f} s"
        )

    def _choose(self) -> Chosen:
        """The plan for the weights of this moment, and what is known of the model."""
        data = self._calibration_data
        if data is None and self._needs_data:
            data = self._training_inputs()
        keep = self._sequential is not False
        if isinstance(self._source, Options):
            return choose(
                self.model, self._source, data, keep=keep, verbose=self.verbose, stacklevel=4
            )
        inventory = Inventory.of(self.model)
        match(inventory, self._source)
        calibration = None
        if data is not None:
            calibration = Calibration.of(
                inventory, data, keep=keep, verbose=self.verbose, stacklevel=4
            )
        return Chosen(self._source, inventory, calibration)

    def _check(self) -> Inventory:
        """Raises what is wrong with model and options, as far as it does not depend on weights."""
        if isinstance(self._source, Options):
            return selection_of(
                self.model, self._source, verbose=self.verbose, stacklevel=3
            ).inventory
        inventory = Inventory.of(self.model)
        match(inventory, self._source)
        return inventory

    def _cr(self) -> float:
        before = self._params_before
        return removed_fraction(before, count_params(self.model)) if before else 0.0

    def _factorized_layers(self) -> list[Any]:
        return [layer for _, layer in walk(self.model) if is_factorized(layer)]

    def _say(self, line: str) -> None:
        if self.verbose:
            print(f"ALDSCompress: {line}")

    # -- What it needs of the training -------------------------------------------------------

    @property
    def _needs_data(self) -> bool:
        if isinstance(self._source, CompressionPlan):
            return wants_data(self._source)
        return METHODS[self._source.method].needs_data

    @property
    def _needs_forward(self) -> bool:
        """Whether the model has to be run, or its calls traced."""
        limits_calls = isinstance(self._source, Options) and self._source.resources != ("params",)
        return self._needs_data or limits_calls

    def _training_inputs(self) -> Any:
        """The `x` of the `fit` that is running; Keras hands a callback no data."""
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
        found = self._callbacks
        if found is None:
            _, found = _backend.backend_of(self.model).calling_fit(self.model)
        return [callback for callback in found if callback is not self]

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


ALDSCompress.__doc__ = documented(ALDSCompress.__doc__)
