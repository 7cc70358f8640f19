"""`ALDSCompress`: compression inside `model.fit`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keras_alds import _backend
from keras_alds._backend.strategies import Replicas
from keras_alds.backups import Backup, Part
from keras_alds.boards import Board
from keras_alds.choosing import Chosen, make_choice, selection_of, wants_data
from keras_alds.distillation import Distillation
from keras_alds.distillation import stop as stop_distillation
from keras_alds.kinds.base import is_factorized
from keras_alds.methods import METHODS
from keras_alds.models import workers
from keras_alds.models.calibration import check_data
from keras_alds.models.data import is_iterator
from keras_alds.models.first_epoch import FirstEpoch
from keras_alds.models.fit import check_sequential
from keras_alds.models.in_place import apply
from keras_alds.models.inventory import (
    check_model,
    count_params,
    dense_params,
    has_weights,
    walk,
)
from keras_alds.models.matching import match
from keras_alds.models.own_lists import own_lists
from keras_alds.models.ranks import SettlingTime
from keras_alds.models.recompose import Request, already, inspected, recomposed, to_recompose
from keras_alds.models.scale import warn_of_other_inputs
from keras_alds.models.submodels import find_submodel, frozen_part, twins
from keras_alds.models.turns import alone
from keras_alds.options import (
    Options,
    SelectOptions,
    documented,
    takes_options,
)
from keras_alds.plan import CompressionPlan
from keras_alds.refinement import check_examples, refined, steps_of
from keras_alds.resources import RESOURCES, removed_fraction
from keras_alds.rewinding import Rewinding, check_rewind
from keras_alds.stages import AUTO, Course, Stage, stages_of
from keras_alds.tables import counted

if TYPE_CHECKING:
    from typing_extensions import Unpack


#: What to remove in one step.
Fraction = float | Mapping[str, float]


class ALDSCompress(_backend.Callback):
    """Compresses the model during training.

    Before the epoch with index `at_epoch` (counted from 0), slices and ranks are chosen for the
    current weights, and the layers are factorized **in place**. The model and its layers stay the
    same objects. Training then continues. The callback works in `fit` of Keras 3 and tf_keras.

    Every optimizer of the model keeps `iterations` (but see `rewind_epochs`), the learning rate and
    its schedule, the loss scale, and the state of all variables that are not factorized, such as
    biases. For a factorized kernel W ≈ E D, state that is linear in past gradients G (momentum,
    first moments, accumulated gradients) is converted by the chain rule to G Dᵀ and Eᵀ G. Second
    moments are converted with the squared factors, their expectation for uncorrelated gradients.
    Weight averages (EMA) start at the factors. This holds for SGD, Adam, AdamW, Adamax, Nadam,
    Lion, RMSprop, Adagrad and Adadelta. Any other state of a factor (RMSprop's momentum and average
    gradient, Adamax's norm, the state of other optimizers) starts at its initial value.

    The compression also resets what other callbacks stored about the dense model: the best value
    and weights of `EarlyStopping`, the patience count of `ReduceLROnPlateau`, and the best value
    of `ModelCheckpoint(save_best_only=True)`, whose file will hold the best *compressed* model.

    With `BackupAndRestore` in the list, the same script goes on after its process was killed at any
    moment, before or after the compression. The plan is kept in the backup's folder, and the model
    is factorized by it again before Keras restores the weights. The order of the callbacks does not
    matter. A backup that does not fit is an error before the first step.

    The logs of every epoch contain `alds_cr`, the fraction of parameters removed so far, and
    `alds_params`, the number of parameters. `History` and `CSVLogger` have them from the first
    epoch on, since `CSVLogger` fixes its columns there. Keras prints them from the compression on.
    If callbacks in one `fit` compress different submodels, the names end in that of the submodel,
    as in `alds_cr_student`.

    With `TensorBoard` in the list, or `log_dir`, TensorBoard shows a run `alds`: `cr`, parameters,
    MACs, and the rank and error of each layer after every epoch; the table of the plan as a text;
    singular values of the kernels as histograms, before each compression and at the end.

    If training starts after `at_epoch` (`initial_epoch`), the model is compressed before its first
    epoch.

    A model that is compressed already, as far as asked or further, is trained on as it is. Before
    the first epoch, a line says so. Otherwise it is compressed further: in place, each factorized
    layer becomes dense again (W = E D), and slices and ranks are chosen anew. `cr` counts against
    the parameters of the dense model. So lists as `cr` and `at_epoch` compress step by step, and so
    do several callbacks with growing `cr`, in one `fit` or in several. The optimizers follow both
    ways. State that is linear in gradients keeps the part that the factors hold; squared gradients
    are taken to be products of a row and a column, as in Adafactor.

    In a model that trains others, such as a teacher and its student, name the one to compress as
    `submodel`. Without it, the model must hold no frozen model among the layers to compress, since
    its factors could not be trained.

    Under a distribution strategy, all replicas get the same factors. Of several processes, the
    chief chooses, with its calibration data, and the others take over its plan, weights and
    optimizer state. Before that they compare weights.

    Args:
        cr: Float, 0 < cr < 1, or dict. The fraction to remove; see `select`. A list for several
            steps; each has to remove more than the one before.
        at_epoch: Integer >= 0, or `"auto"`. Index of the epoch before which to compress, as in
            `initial_epoch`. 0 compresses the weights that `fit` starts with; use it only for a
            model that is already trained. A growing list as long as `cr`, if that is one. `"auto"`
            compresses once the ranks of all layers have settled: each stable rank
            ‖W‖²_F / ‖W‖²_2 has once changed by at most 1 % per epoch, taken over 5 epochs. The
            latest epoch is half of the `epochs` of `fit`.
        plan: A `CompressionPlan` to apply instead of selecting one. Excludes `cr`.
        submodel: The part to compress: its attribute path in the model that is being trained, such
            as `"student"`, `"wrapped.encoder"` or `"blocks.0"`, or the model or layer itself.
            `cr`, the plan, the logs and the printed line count this part only. With calibration
            data or an objective other than `"params"`, it must be a model. Defaults to None: the
            whole model.
        calibration_data: As for `select`. It is run through the model just before the compression.
            Defaults to None: if the method needs data, as `"activation"` does, up to 1024 examples
            of the `x` of `fit` are used (evenly spaced in arrays; a data set or PyDataset is
            iterated once more). If `x` is a generator, which cannot be restarted, pass examples
            here. With `submodel` these are inputs of the submodel, and a method that needs data
            takes none from `fit`.
        sequential: As for `compress`.
        refine: Boolean or integer. Whether to train the compressed model without labels, to be
            like it was before, on the calibration examples; see `compress`. The optimizers take no
            part. The dense model is copied for this time. Not for a model with several replicas.
            Defaults to False.
        rewind_epochs: Integer >= 0. How many epochs to set the clock of the learning rate back at
            the compression, for good: after a compression before epoch e, epoch e + n has the rate
            that epoch e - rewind_epochs + n would have had. It is at most the epochs that lie
            before the first step and between steps. For a `LearningRateSchedule`,
            `optimizer.iterations` goes back, and averages that are corrected by it are scaled, so
            that Adam's corrected values stay. A `LearningRateScheduler` gets an earlier epoch. With
            `ReduceLROnPlateau` the rate becomes what it was. Weight decay, which Keras multiplies
            by the rate, follows; what other callbacks set does not. Defaults to 0.
        distill: Boolean, float or dict. Whether the model just before the compression (the first of
            several), in inference mode and with the same inputs, teaches the compressed one until
            `fit` ends. The distance of their outputs is added to the compiled loss, if there is
            one: the Kullback–Leibler divergence of scores or probabilities divided by a
            temperature, else the relative squared error. True has weight 1, a float is the weight.
            A dict has `"weight"`, `"temperature"` (defaults to 2) and `"features"`: names or paths
            of layers whose outputs are to have a small relative squared error, or True for the ends
            of all blocks. A `train_step` of the model's own has to call `compute_loss`. With
            `submodel` this needs `calibration_data`. Files of the model hold nothing of it; a
            backup holds the teacher. Defaults to False.
        callbacks: The other callbacks of `fit`. Defaults to None: they are taken from the `fit`
            call that is running.
        log_dir: Folder for TensorBoard. Defaults to None: that of the `TensorBoard` callback, if
            there is one.
        verbose: 0 prints nothing; otherwise the compression prints one line. Defaults to 1.
        {options}

    Attributes:
        plan: The `CompressionPlan` of the last step, or None as long as the callback has
            compressed nothing.
        at_epoch: The epoch or epochs. With `"auto"`, the latest one until the ranks have settled.

    Raises:
        TypeError: From the constructor, if `at_epoch` is missing or an option's name is unknown.
        ValueError: From the constructor, if an argument is invalid. From `fit`, if the model
            cannot be compressed (see `select`), holds no such submodel or a frozen model, a backup
            of `BackupAndRestore` does not fit it, or several of these callbacks contradict.
            `fit` checks this when training starts, except for what depends on the weights, and
            changes nothing before the checks pass.

    Example:
    ```python
    model.fit(x, y, epochs=120, callbacks=[keras_alds.ALDSCompress(cr=0.5, at_epoch=80)])
    ```

    References:
        Liebenwein et al., NeurIPS 2021, arXiv:2107.11442, section 3: train, compress, retrain.
        Wang et al., "Cuttlefish: Low-Rank Model Training without All the Tuning", MLSys 2023,
        arXiv:2305.02538: compress when all stable ranks have settled.
    """

    plan: CompressionPlan | None
    at_epoch: int | str | Sequence[int]
    verbose: int
    _stages: tuple[Stage, ...]
    _source: Request
    _submodel: Any
    _calibration_data: Any
    _sequential: bool | None
    _steps: int | None
    _callbacks: Sequence[Any] | None
    _log_dir: str | os.PathLike[str] | None
    _board: Board | None

    @takes_options()
    def __init__(
        self,
        cr: Fraction | Sequence[Fraction] | None = None,
        *,
        at_epoch: int | str | Sequence[int],
        plan: CompressionPlan | None = None,
        submodel: Any = None,
        calibration_data: Any = None,
        sequential: bool | None = None,
        refine: bool | int = False,
        rewind_epochs: int = 0,
        distill: bool | float | Mapping[str, Any] = False,
        callbacks: Sequence[Any] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        verbose: int = 1,
        **options: Unpack[SelectOptions],
    ) -> None:
        super().__init__()
        # A method that needs data takes the inputs of `fit` if none are given here.
        named = METHODS.get(str(options.get("method")))
        has_data = calibration_data is not None or (named is not None and named.needs_data)
        self._stages = stages_of(cr, at_epoch, plan, options, has_data=has_data)
        self._source = self._stages[0].request
        self._distill = Distillation.checked(distill)
        self._auto = at_epoch == AUTO
        if self._auto and rewind_epochs:
            raise ValueError(
                "Expected an epoch as `at_epoch` with `rewind_epochs`. Received: at_epoch='auto', "
                f"rewind_epochs={rewind_epochs}"
            )
        self._rewind_epochs = check_rewind(rewind_epochs, [s.at_epoch for s in self._stages])
        if submodel is not None and calibration_data is None and self._needs_data:
            raise ValueError(
                "Expected `calibration_data`, inputs of the submodel, for a method that needs "
                "data: the `x` of `fit` are inputs of the whole model. "
                f"Received: calibration_data=None, submodel={submodel!r}"
            )
        data = () if calibration_data is None and self._needs_data else calibration_data
        check_sequential(sequential, data, self._source.method)
        if self._distill is not None and (submodel is not None or calibration_data is not None):
            check_examples(calibration_data, "calibration_data", "`distill`")
        self._steps = steps_of(refine, data)
        self._submodel = submodel
        self._calibration_data = calibration_data
        self._sequential = sequential
        self._callbacks = callbacks
        self._log_dir, self._board = log_dir, None
        self.at_epoch = at_epoch
        self.verbose = verbose
        self.plan = None
        self._start_training()

    def _start_training(self) -> None:
        self._rewinding: Rewinding | None = None
        self._course = Course(self._stages)
        self._done = self._told = False
        self._thresholds: dict[int, float | None] = {}
        self._checked = False
        self._suffix = ""
        self._settling: SettlingTime | None = None
        self._params_before: int | None = None
        self._first_epoch: FirstEpoch | None = None
        self._named_lists: set[str] = set()

    # -- Methods that Keras calls ------------------------------------------------------------

    def set_model(self, model: Any) -> None:
        """Compresses the model as in a backup that `BackupAndRestore` is going to restore.

        Raises if there is no such submodel, or the backup does not fit.
        """
        super().set_model(model)
        self._part, self._board = find_submodel(model, self._submodel), None
        self._resumed: list[Request] = []
        self._teacher: Any | None = None
        is_backup = _backend.backend_of(model).is_backup
        self._backups = [Backup(model, c) for c in self._siblings() if is_backup(c)]
        for backup in self._backups:
            with alone(model):
                self._resume(backup)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Raises every error that can be found before the first epoch."""
        self._start_training()
        if self._auto:
            self._settling = SettlingTime((self.params or {}).get("epochs"))
            self._set_epoch(self._settling.latest)
        if self._steps is not None:
            workers.check_refinable(self.model)
        self._check_others()
        names = (f"alds_cr{self._suffix}", f"alds_params{self._suffix}")
        backend = _backend.backend_of(self.model)
        for callback in self._siblings():
            backend.hide_logs(callback, names, lambda: not self._done)
            self._thresholds[id(callback)] = backend.threshold(callback)
        if self._calibration_data is not None or self._needs_forward or self._distill:
            self._check_forward()
        if has_weights(self._part):
            self._params_before = self._dense_params()
            with alone(self.model):
                self._drop_met()
                self._check()
            if (
                self._course.left
                and self._calibration_data is not None
                and self._part is self.model
            ):
                x, _ = backend.calling_fit(self.model)
                warn_of_other_inputs(self.model, self._calibration_data, x, stacklevel=2)
        if self._needs_data and self._calibration_data is None and self._course.left:
            self._training_inputs()
        if self._rewind_epochs:
            steps = (self._steps_at, self._course.count_until)
            self._rewinding = Rewinding(self.model, self._siblings(), self._rewind_epochs, *steps)
        workers.check_alike(
            Replicas(self.model),
            "`ALDSCompress`",
            ", ".join([*map(str, self._stages), *self._extras]),
            "Pass the same arguments in every process.",
        )
        self._board = self._board_of_part()
        self._warn_of_best_epochs()
        self._warn_of_twins()
        if self._course.left and has_weights(self._part):
            self._warn_of_own_lists(self._course.left[0].request)
        epochs = (self.params or {}).get("epochs")
        if epochs is not None and not self._auto:
            self._warn_of_end([s for s in self._course.left if s.at_epoch >= epochs], "will not be")

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Compresses the model before epoch `at_epoch`."""
        self._look_at_ranks(epoch)
        for backup in self._backups:
            backup.note_epoch(epoch)
        if self._rewinding is not None:
            self._rewinding.begin(epoch)
        if not self._checked and has_weights(self._part):  # it had none when training began
            with alone(self.model):
                self._drop_met()
                self._check()
        times = self._steps_at(epoch)
        if due := self._due(epoch):
            self._warn_of_late_start(epoch)
            self._compress(epoch, due[-1].request)
        self._course.begin(epoch)
        self._course.drop(len(due))
        if self._rewinding is not None and times:
            self._rewinding.rewind(epoch, times, self.params.get("steps"))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds `alds_cr` and `alds_params` to the logs."""
        if logs is not None:
            logs[f"alds_cr{self._suffix}"] = self._cr()
            logs[f"alds_params{self._suffix}"] = count_params(self._part)
        if self._board is not None:
            with alone(self.model):
                self._board.add_epoch(epoch, self._cr(), self.plan)
        if self._first_epoch is not None:
            self._first_epoch.warn(logs or {}, stacklevel=2)
            self._first_epoch = None

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Warns if the training ended before `at_epoch`, and ends what lasts as long as it."""
        if self._rewinding is not None:
            self._rewinding.end()
        if self._distill is not None:
            stop_distillation(self.model)
        if self._board is not None:
            with alone(self.model):
                self._board.close()
        self._rewinding, self._backups, self._teacher = None, [], None
        self._warn_of_end(self._course.left, "was not")

    # -- The compression ---------------------------------------------------------------------

    def _compress(self, epoch: int, request: Request) -> None:
        start = time.perf_counter()
        check_model(self._part)
        self._warn_of_own_lists(request)  # some are made in the first epochs
        if self._params_before is None:
            self._params_before = self._dense_params()
        before = count_params(self._part)
        with alone(self.model):
            if self._board is not None:
                self._board.add_spectra(epoch)
            needs_teacher = self._distill is not None and self._teacher is None
            original = self._copied() if needs_teacher or self._steps is not None else None
            chosen = self._change(request)
            if self._steps is not None:
                result = refined(
                    self._part, original, chosen.examples, self._steps, verbose=self.verbose
                )
            for backup in self._backups:
                backup.add(self._part_key, chosen.plan, original if needs_teacher else None)
            if needs_teacher:
                self._teacher = original
            if self._distill is not None:
                self._distill.start(self.model, self._part, self._teacher, self._examples())
        self.plan, self._done = chosen.plan, True
        if self._board is not None:
            self._board.add_plan(epoch, chosen.plan)
        backend = chosen.inventory.backend
        for callback in self._siblings():
            backend.forget_best(callback, self._thresholds.get(id(callback)))
        layers = [layer for layer in self._factorized_layers() if layer.trainable]
        factors = [factor for layer in layers for factor in layer.factors]
        self._first_epoch = FirstEpoch(self.model, factors) if factors else None
        frozen = len(self._factorized_layers()) - len(layers)
        self._say(
            f"epoch {epoch}: {self._named}{before:,} → {count_params(self._part):,} parameters "
            f"(cr={self._cr():.4f}), {counted(len(chosen.plan.factorized), 'layer')} factorized "
            f"{f'({frozen} of them frozen) ' if frozen else ''}in "
            f"{time.perf_counter() - start:.1f} s"
        )
        if self._steps is not None:
            self._say(f"refinement: {result}")

    def _board_of_part(self) -> Board | None:
        """What shows the compression of this part in TensorBoard, shared if the folder is one."""
        others = [other for other in self._siblings() if isinstance(other, ALDSCompress)]
        for other in others:
            same = other._part is self._part and self._log_dir in (None, other._log_dir)
            if same and other._board is not None:
                return other._board
        return Board.of(self._log_dir, self._siblings(), self.model, self._part, self._suffix)

    def _change(self, request: Request) -> Chosen:
        """Chooses slices and ranks, and factorizes the layers."""
        inventory, trainer = inspected(self._part, request), self.model
        factorized = to_recompose(inventory, request)
        with recomposed(inventory, factorized, keep=True, trainer=trainer) as dense:
            data = self._calibration_data
            if data is None and self._needs_data:
                data = self._training_inputs()
            replicas = Replicas(self.model)
            workers.check_weights(replicas, self.model)
            choose = functools.partial(
                make_choice,
                dense,
                request,
                data,
                self._sequential,
                verbose=self.verbose,
                stacklevel=5,
            )
            if replicas.count == 1:
                chosen = choose()
            else:
                chosen = workers.plan_of_chief(
                    replicas,
                    choose,
                    lambda chosen: chosen.plan,
                    lambda plan: Chosen(plan, dense, None),
                )
            apply(
                chosen.inventory,
                chosen.plan,
                chosen.calibration,
                self._sequential,
                trainer=trainer,
                last=True,
                verbose=self.verbose,
                stacklevel=4,
            )
        return chosen

    def _look_at_ranks(self, epoch: int) -> None:
        """With `at_epoch="auto"`, takes this epoch if the ranks have settled."""
        if self._settling is None or self._done or epoch > self._stages[0].at_epoch:
            return
        if not has_weights(self._part):  # there will be some before the next epoch
            return
        with alone(self.model):
            mine = self._settling.has_come(inspected(self._part, self._source))
        settled = workers.verdict_of_chief(Replicas(self.model), mine)
        if settled:
            self._set_epoch(epoch)
            self._say(f"epoch {epoch}: {self._named}the ranks of all layers have settled")
        elif epoch == self._stages[0].at_epoch:
            self._say(f"epoch {epoch}: {self._named}the latest epoch; not all ranks have settled")

    def _set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the only step, which `at_epoch="auto"` leaves open."""
        self.at_epoch = epoch
        stage = dataclasses.replace(self._stages[0], at_epoch=epoch)
        self._stages = (stage,)
        self._course = Course(self._stages)

    def _resume(self, backup: Backup) -> None:
        """Gives the model the structure that it has in a backup."""
        callbacks = [self, *(c for c in self._siblings() if isinstance(c, ALDSCompress))]
        parts = {
            c._part_key: Part(find_submodel(self.model, c._submodel), c._source) for c in callbacks
        }
        for past in backup.resume(parts):
            for stage in self._stages if past.part == self._part_key else ():
                if stage.asks_for(past.plan):
                    self.plan = past.plan
                    self._resumed.append(stage.request)
        if self._resumed and self._distill is not None:
            self._teacher = backup.teacher(self._part_key, parts[self._part_key], self._copied)

    def _due(self, epoch: int) -> list[Stage]:
        """The steps to take before an epoch, of those that the model does not meet already."""
        if not self._course.due(epoch):
            return []
        with alone(self.model):
            self._drop_met()
        missed = self._course.missed(epoch)
        if missed and self._measured and self._factorized_layers():
            self._done = True
            self._course.drop(len(missed))
            self._say(f"epoch {epoch}: {self._named}already compressed, training on")
        return self._course.due(epoch)

    def _warn_of_late_start(self, epoch: int) -> None:
        """Weights of a compressed model may have been loaded into the dense one, some of them."""
        missed = [] if self._auto else self._course.missed(epoch)
        if missed and not self._resumed and not self._factorized_layers():
            warnings.warn(
                f"Training starts at epoch {epoch}, after at_epoch={missed[-1].at_epoch}, with a "
                "model that is not compressed: it is compressed now. If its weights come from a "
                "checkpoint of the compressed model, most of them were not loaded. Load the whole "
                "model, or call `apply_plan` before `load_weights`.",
                stacklevel=2,
            )

    def _steps_at(self, epoch: int) -> int:
        """How many steps an epoch begins with, a step that the model meets already included.

        Those of the first epoch are those that no earlier run has taken.
        """
        first = self._course.is_first(epoch)
        return len(self._due(epoch)) if first else self._course.count_at(epoch)

    def _warn_of_end(self, left: Sequence[Stage], verb: str) -> None:
        """Warns, once, of steps that come after the end of the training."""
        if left and not self._told:
            self._told = True
            further = self._done or len(left) < len(self._course.left)
            warnings.warn(
                f"The model {verb} compressed{' further' if further else ''}: training ends "
                f"before epoch index at_epoch={left[0].at_epoch} (epochs are counted from "
                f"0). Received: epochs={(self.params or {}).get('epochs')}",
                stacklevel=3,
            )

    def _warn_of_best_epochs(self) -> None:
        """KerasTuner takes the best epoch, and loads its weights into a model that it builds."""
        tuners = [c for c in self._siblings() if type(c).__module__.startswith("keras_tuner")]
        if tuners and self._course.left:
            warnings.warn(
                "KerasTuner keeps the best epoch of a training, which may be one before the "
                "compression, and loads its weights into a dense model. Compress in the function "
                "that builds the model: load a trained one, and return "
                "`keras_alds.compress(trained, cr=hp.Float(…))`, compiled.",
                stacklevel=3,
            )

    def _warn_of_twins(self) -> None:
        """Warns of two models of which one may be a moving average of the other."""
        pair = twins(self.model) if self._course.left and has_weights(self.model) else None
        if pair is not None and (self._submodel is None or self._part_name in pair):
            warnings.warn(
                f"'{pair[0]}' and '{pair[1]}' have weights of the same shapes. If one is a moving "
                "average of the other, as in momentum encoders, the compression breaks that: each "
                "gets factors of its own, and averaging factors does not average kernels. "
                "Train in two calls of `fit`, and between them apply one plan to both and copy the "
                "weights of one to the other.",
                stacklevel=3,
            )

    def _warn_of_own_lists(self, request: Request) -> None:
        """Warns, once of each, of lists of users that go by weights which are to be replaced."""
        inventory = inspected(self._part, request)
        records = [*inventory.candidates, *to_recompose(inventory, request)]
        for name, owner in own_lists(self.model, self._part, self._siblings(), records):
            if name in self._named_lists:
                continue
            self._named_lists.add(name)
            warnings.warn(
                f"`{name}` is a list with one array for each weight of '{owner}', of the same "
                "shapes. After the compression, the weights have other shapes. If your code goes "
                "by this list then, make it again in `on_epoch_begin` of a callback that comes "
                "after ALDSCompress in `callbacks`. Or train in two calls of `fit`, and between "
                "them call `apply_plan` and make it again.",
                stacklevel=3,
            )

    def _drop_met(self) -> None:
        """Leaves out the first steps, as far as the model is compressed already; says so once."""
        found = None
        while self._course.left:
            met = self._how_met(self._course.left[0].request)
            if met is None:
                break
            found = met
            self._course.drop(1)
        if found is None:
            return
        self._say(f"{self._named}{found}, training on")
        if self._distill is not None and self._teacher is not None:
            self._distill.start(self.model, self._part, self._teacher, self._examples())
        elif self._distill is not None and not self._done:
            warnings.warn(
                f"Expected a model that is not compressed yet, for `distill` to learn from. "
                f"Received: '{self._part.name}', {found}. Training goes on without a teacher.",
                stacklevel=4,
            )
        self._done = True

    def _how_met(self, request: Request) -> str | None:
        """What is true of the model if it meets a request already; else None."""
        if any(request is known for known in self._resumed):
            return "compressed as in the backup"
        return already(inspected(self._part, request), request, strict=False)

    def _check(self) -> None:
        """Raises every error of model and options that does not depend on the weights."""
        for stage in self._course.left:
            self._check_request(stage.request)
        if self._course.left and (self._steps is not None or self._distill is not None):
            self._copied()
        if self._course.left and self._distill is not None:
            self._distill.check(self.model, self._part, self._examples())
        self._checked = True

    def _check_request(self, request: Request) -> None:
        inventory = inspected(self._part, request)
        with recomposed(inventory, to_recompose(inventory, request)) as inventory:
            if isinstance(request, Options):
                selection = selection_of(inventory, request, verbose=self.verbose, stacklevel=5)
                inventory, chosen = selection.inventory, selection.inventory.candidates
            else:
                pairs = match(inventory, request)
                chosen = tuple(record for record, choice in pairs if choice.factorized)
            if self._calibration_data is not None:
                check_data(inventory, self._calibration_data)
        if self._submodel is not None or (found := frozen_part(self._part, chosen)) is None:
            return
        raise ValueError(
            "Expected `submodel` or `exclude` to say what to compress of a model with frozen "
            f"parts, whose factors would not be trained. Received: {found}. Pass the path of the "
            "model to compress as `submodel`, exclude the frozen part (it still counts in `cr`), "
            "or pass the model that is trained as `submodel` to compress all of it."
        )

    def _copied(self) -> Any:
        """A copy of the part to compress: what a refinement is to be like."""
        backend = _backend.backend_of(self._part)
        try:
            with backend.creation_scope(self.model):
                return backend.copy_model(self._part, stacklevel=5)
        except ValueError as error:
            raise ValueError(
                "Expected a model that can be copied, for `refine` or `distill` to compare with. "
                f"Received: {error}"
            ) from error

    def _check_forward(self) -> None:
        """Raises a ValueError if the part to compress cannot be run."""
        backend = _backend.backend_of(self._part)
        if not backend.is_model(self._part):
            raise ValueError(
                "Expected `submodel` to be a model, which calibration data and objectives other "
                f"than \"params\" require. Received: the layer '{self._part.name}' of type "
                f"{type(self._part).__name__}"
            )
        backend.check_call(self._part)

    def _check_others(self) -> None:
        """Raises a ValueError if another `ALDSCompress` contradicts this one."""
        others = [c for c in self._siblings() if isinstance(c, ALDSCompress)]
        if self._rewind_epochs and any(other._rewind_epochs for other in others):
            raise ValueError(
                "Expected `rewind_epochs` in one ALDSCompress callback of `fit`. Received: "
                "several. For several steps, pass lists as `cr` and `at_epoch` to one callback."
            )
        if any(other._part is not self._part for other in others):
            self._suffix = f"_{self._part_name}"
        theirs = [other for other in others if other._part is self._part]
        for other in theirs if self._auto else [o for o in theirs if o._auto]:
            raise ValueError(
                "Expected no other ALDSCompress for a model that one compresses with "
                "at_epoch='auto': which comes first is not known. Received: "
                f"{self._stages[0]} and {other._stages[0]}"
            )
        stages = [stage for other in theirs for stage in other._stages]
        for earlier, later in itertools.product(stages, self._stages):
            if earlier.at_epoch <= later.at_epoch and later.contradicts(earlier):
                raise ValueError(
                    "Expected several ALDSCompress callbacks for one model to remove more and "
                    f"more. Received: {earlier}, then {later}"
                )

    @property
    def _extras(self) -> list[str]:
        """What changes the training besides the compression, as text."""
        rewind = [f"rewind_epochs={self._rewind_epochs}"] if self._rewind_epochs else []
        return [*rewind, f"distill={self._distill}"] if self._distill else rewind

    @property
    def _measured(self) -> bool:
        """Whether it cannot be counted how far a compressed model is compressed."""
        return isinstance(self._source, Options) and any(
            RESOURCES[name].measured for name in self._source.limits
        )

    @property
    def _part_name(self) -> str:
        """What the user calls the submodel."""
        return self._submodel if isinstance(self._submodel, str) else self._part.name

    @property
    def _part_key(self) -> str:
        """What the files of a backup call the submodel."""
        if self._submodel is None or isinstance(self._submodel, str):
            return self._submodel or ""
        return str(self._submodel.name)

    @property
    def _named(self) -> str:
        """The beginning of messages about a submodel."""
        return "" if self._part is self.model else f"{self._part_name}: "

    def _dense_params(self) -> int:
        """The parameters that `cr` counts against; layers that are factorized by design stay."""
        excluded = [r.layer for r in inspected(self._part, self._source).factorized if r.excluded]
        return dense_params(self._part, excluded)

    def _cr(self) -> float:
        before = self._params_before
        return removed_fraction(before, count_params(self._part)) if before else 0.0

    def _factorized_layers(self) -> list[Any]:
        return [layer for _, layer in walk(self._part) if is_factorized(layer)]

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
        if x is None or is_iterator(x):
            raise ValueError(
                "Expected `calibration_data`, or training data that can be read twice (arrays, a "
                "tf.data.Dataset or a PyDataset) to take examples from. "
                f"Received: calibration_data=None and x of type {type(x).__name__}"
            )
        return x

    def _examples(self) -> Any:
        """Inputs of the part to compress: those given, or those of the running `fit` call."""
        return self._training_inputs() if self._calibration_data is None else self._calibration_data

    def _siblings(self) -> list[Any]:
        """The other callbacks of `fit`."""
        found = self._callbacks
        if found is None:
            _, found = _backend.backend_of(self.model).calling_fit(self.model)
        return [callback for callback in found if callback is not self]


ALDSCompress.__doc__ = documented(ALDSCompress.__doc__)
