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
from keras_alds.models.turns import alone
from keras_alds.options import (
    Options,
    SelectOptions,
    check_cr_or_plan,
    documented,
    takes_options,
)
from keras_alds.plan import CompressionPlan
from keras_alds.resources import removed_fraction
from keras_alds.tables import counted

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ALDSCompress(_backend.Callback):
    """Compresses the model during training.

    Before the epoch with index `at_epoch` (counted from 0), slices and ranks are chosen for the
    current weights, and the layers are factorized **in place**. The model and its layers stay the
    same objects. Training then continues. The callback works in `fit` of Keras 3 and tf_keras.

    Every optimizer of the model keeps `iterations`, the learning rate and its schedule, the loss
    scale, and the state of all variables that are not factorized, such as biases. For a
    factorized kernel W ≈ E D, state that is linear in past gradients G (momentum, first moments,
    accumulated gradients) is converted by the chain rule to G Dᵀ and Eᵀ G. Second moments are
    converted with the squared factors, their expectation for uncorrelated gradients. Weight
    averages (EMA) start at the factors. This holds for SGD, Adam, AdamW, Adamax, Nadam, Lion,
    RMSprop, Adagrad and Adadelta. Any other state of a factor (RMSprop's momentum and average
    gradient, Adamax's norm, the state of other optimizers) starts at its initial value.

    The compression also resets what other callbacks stored about the dense model: the best value
    and weights of `EarlyStopping`, the patience count of `ReduceLROnPlateau`, and the best value
    of `ModelCheckpoint(save_best_only=True)`, whose file will hold the best *compressed* model.
    `BackupAndRestore` cannot restore a dense model's backup into a compressed model, or the other
    way round; `fit` then raises an error before the first step. To resume training after the
    compression, first factorize the model with `apply_plan` and the saved plan.

    The logs of every epoch contain `alds_cr`, the fraction of parameters removed so far, and
    `alds_params`, the number of parameters.

    If training starts after `at_epoch` (`initial_epoch`), a dense model is compressed before its
    first epoch, and a compressed model is trained as it is.

    Args:
        cr: Float, 0 < cr < 1, or dict. The fraction to remove; see `select`.
        at_epoch: Integer >= 0. Index of the epoch before which to compress, as in
            `initial_epoch`. 0 compresses the weights that `fit` starts with; use it only for a
            model that is already trained.
        plan: A `CompressionPlan` to apply instead of selecting one. Excludes `cr`.
        calibration_data: As for `select`. It is run through the model just before the compression.
            Defaults to None: if the method needs data, as `"activation"` does, up to 1024 examples
            of the `x` of `fit` are used (evenly spaced in arrays; a data set or PyDataset is
            iterated once more). If `x` is a generator, which cannot be restarted, pass examples
            here.
        sequential: As for `compress`.
        callbacks: The other callbacks of `fit`. Defaults to None: they are taken from the `fit`
            call that is running.
        verbose: 0 prints nothing; otherwise the compression prints one line. Defaults to 1.
        {options}

    Attributes:
        plan: The `CompressionPlan`, or None until the model is compressed.

    Raises:
        TypeError: From the constructor, if `at_epoch` is missing or an option's name is unknown.
        ValueError: From the constructor, if an argument is invalid. From `fit`, if the model
            cannot be compressed (see `select`) or a backup of `BackupAndRestore` does not fit it.
            `fit` checks this when training starts, except for what depends on the weights, and
            changes nothing before the checks pass.

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
            # A method that needs data takes the inputs of `fit` if none are given here.
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

    # -- Methods that Keras calls ------------------------------------------------------------

    def set_model(self, model: Any) -> None:
        """Raises if a backup does not fit the model, before any callback restores it."""
        super().set_model(model)
        for callback in self._siblings():
            missing = _backend.backend_of(model).missing_in_backup(callback, model)
            if missing is not None:
                raise ValueError(self._other_backup(callback, missing))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Raises every error that can be found before the first epoch."""
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
        """Compresses the model before epoch `at_epoch`."""
        resumed = not self._started and epoch > self.at_epoch
        if not self._started and not resumed and self._factorized_layers():
            self._check()  # raises, as the model is already compressed
        self._started = True
        if self._done or epoch < self.at_epoch:
            return
        if resumed and self._factorized_layers():
            self._done = True
            self._say(f"epoch {epoch}: the model is already compressed, training continues")
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
                    "No factor has changed in the first epoch after the compression. If the "
                    "learning rate is not zero, a `tf.function` outside the model and its layers "
                    "still runs the dense model. Let Keras wrap `train_step`.",
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
        with alone(self.model):
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
            f"(cr={self._cr():.4f}), {counted(len(chosen.plan.factorized), 'layer')} "
            f"factorized in {time.perf_counter() - start:.1f} s"
        )

    def _choose(self) -> Chosen:
        """The plan for the current weights, with the inventory and calibration statistics."""
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
        """Raises every error of model and options that does not depend on the weights."""
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

    # -- What it takes from `fit` ------------------------------------------------------------

    @property
    def _needs_data(self) -> bool:
        if isinstance(self._source, CompressionPlan):
            return wants_data(self._source)
        return METHODS[self._source.method].needs_data

    @property
    def _needs_forward(self) -> bool:
        """Whether the model has to be run, or its calls traced."""
        limits_calls = isinstance(self._source, Options) and [*self._source.limits] != ["params"]
        return self._needs_data or limits_calls

    def _training_inputs(self) -> Any:
        """The `x` of the running `fit` call; Keras passes no data to callbacks."""
        x, _ = _backend.backend_of(self.model).calling_fit(self.model)
        if x is None or hasattr(x, "__next__"):
            raise ValueError(
                "Expected `calibration_data`, or training data that can be read twice (arrays, a "
                "tf.data.Dataset or a PyDataset) to take examples from. "
                f"Received: calibration_data=None and x of type {type(x).__name__}"
            )
        return x

    def _siblings(self) -> list[Any]:
        """The other callbacks of `fit`."""
        found = self._callbacks
        if found is None:
            _, found = _backend.backend_of(self.model).calling_fit(self.model)
        return [callback for callback in found if callback is not self]

    def _other_backup(self, callback: Any, missing: str) -> str:
        state = "not compressed"
        remedy = (
            "factorize the model before `fit` with `apply_plan(model, plan)`, where the plan was "
            "saved in the first run with `callback.plan.save(path)`"
        )
        if self._factorized_layers():
            state, remedy = "compressed", "start with the original, uncompressed model"
        return (
            f"Expected the backup that `BackupAndRestore` would restore to fit the model "
            f"'{self.model.name}', which is {state}. Received: backup_dir="
            f"{os.fspath(callback.backup_dir)!r}, without {missing}. To resume, {remedy}. To start "
            "over, delete the folder."
        )


ALDSCompress.__doc__ = documented(ALDSCompress.__doc__)
