"""`refine` trains a compressed model, without labels, to be like the original one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors, wrappers
from keras_alds._backend.layers import KerasModel
from keras_alds._backend.loops import Traced, passing, same_noise
from keras_alds._backend.refining import (
    Refiner,
    as_is,
    centred_logarithms,
    log_odds,
    outputs_of,
)
from keras_alds.core.slicing import Array
from keras_alds.kinds.base import is_factorized
from keras_alds.models.blocks import shared_blocks
from keras_alds.models.calibration import CalibrationStats
from keras_alds.models.data import DEFAULT_EXAMPLES, Examples, KeptExamples, fixed_batch_size
from keras_alds.models.inventory import check_is_model, walk
from keras_alds.models.minibatches import Split, flipped, image_axes, shifted
from keras_alds.models.outputs import OutputKind, Reference, differing, joined
from keras_alds.models.turns import alone
from keras_alds.progress import progress_bar

#: Steps of `refine=True`.
STEPS = 200
# Examples in a step, and the learning rate of the first one.
_BATCH, _RATE = 64, 1e-3
# Steps between two looks at the examples held out, and looks without a gain before it ends.
_LOOK_EVERY, _PATIENCE = 20, 4
# After so many looks without a gain, or if the distance has become so many times as large, it goes
# back to the best weights and takes steps of this part of the size.
_GO_BACK, _MUCH_WORSE, _SMALLER = 2, 1.25, 0.3
# Of weights that are about as good on so few examples, the later ones are the better ones on
# others: they have seen more, in smaller steps.
_ABOUT = 1.03
# Images are flipped if that changes the original's outputs by at most so many times as much as
# shifts do.
_FLIP_FACTOR = 1.5
# Changed copies of images held out, unless the outputs of one have more entries than this.
_COPIES, _MOST_ENTRIES = 2, 1 << 22
_SCORES = {
    OutputKind.PROBABILITIES: centred_logarithms,
    OutputKind.BINARY: log_odds,
    OutputKind.SCORES: as_is,
    OutputKind.VALUES: as_is,
    OutputKind.LABELS: None,
    OutputKind.RANDOM: None,
}


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What `refine` has done.

    Attributes:
        steps: The number of steps taken; 0 if the original's outputs are random, so that nothing
            can be compared with them.
        best_step: The step whose weights were kept; 0 if no step was better than the start.
        before: How far the outputs were from the original's on the examples held out. For scores
            and probabilities it is the total variation distance, which is the probability, from 0
            to 1, that is given to other classes; for other outputs, the squared error relative to
            their variance. Several outputs add up.
        after: The same of the weights that were kept. At most `before`.
        trained_on: The number of examples that it trained on.
        augmented: How they were changed at random: `"shift"` and `"flip"` for images, or nothing.
    """

    steps: int
    best_step: int
    before: float
    after: float
    trained_on: int
    augmented: tuple[str, ...]

    def __str__(self) -> str:
        if not self.steps:
            return "the original's outputs differ each time, so nothing can be compared with them"
        if not self.best_step:
            return f"no gain on examples held out in {self.steps} steps"
        return (
            f"distance to the original's outputs {self.before:.3g} → {self.after:.3g} on examples "
            f"held out, after {self.best_step} steps"
        )


def refine(
    small: KerasModel,
    original: KerasModel,
    data: Any,
    *,
    steps: int = STEPS,
    verbose: int = 1,
) -> Refinement:
    """Trains a compressed model **in place**, without labels, to be like the original one.

    The outputs of its blocks (see below) and its scores are to be those of `original` on the same
    examples. The loss is the squared error of the scores, relative to their squares, and the mean
    of the same over the blocks. Factors, biases, and scale and offset of normalizations are
    trained; what is frozen, and kernels that are not factorized, stay. A model without factorized
    layers is trained as a whole. Both models run in inference mode: moving statistics do not
    change. Regularizers have no effect, constraints and pruning masks do. Optimizer and compile
    state of `small` are not touched.

    A quarter of the examples, at most 128, is held out. They judge the weights at the start, every
    20 steps and at the end; so do changed copies of images. The best weights are kept, and the last
    of about equal ones. So the model never gets worse on the examples held out. If 40 steps have
    brought nothing, or 20 have made it much worse, the training goes back to the weights that are
    kept and takes smaller steps. After 80 steps without a gain, it ends.

    A block of a Functional or Sequential model ends with each residual add and the activation
    behind it. Without adds, it is a layer with a kernel, with BatchNormalization and activation. In
    subclassed models, the layers that the code holds are the blocks.

    If one input of the model holds images (1 or 3 channels, sides of at least 8 pixels), they are
    shifted at random by up to an eighth of their sides. They are flipped left to right if that
    changes the original's outputs hardly more than shifts do. So photographs are flipped, digits
    are not.

    Args:
        small: A built Keras 3 or tf_keras model, such as `compress` returns. It is changed.
        original: The model that it was made from, or another one with the same inputs and outputs.
        data: Examples, as `calibration_data` of `select`: a few hundred or more, without labels.
            At most 1024 are used.
        steps: Integer >= 1. The largest number of steps of Adam, with 64 examples each. The
            learning rate falls from 1e-3 to 0 by a cosine. Defaults to 200.
        verbose: 0 prints nothing; otherwise a terminal shows a progress bar. Defaults to 1.

    Returns:
        A `Refinement`, which says how far the outputs were from the original's before and after.

    Raises:
        ValueError: Before anything is changed: if an argument is invalid, the models share
            weights, belong to different Keras versions, or differ in their outputs; if `small` has
            nothing to train, or layers that TF-MOT clusters or quantizes; if no output is
            floating-point or has gradients, or one is not finite; or if the data do not fit.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5, calibration_data=x)
    result = keras_alds.refine(small, model, x)
    print(result)  # distance to the original's outputs 0.127 → 0.109 on examples …
    ```

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531;
        Romero et al., "FitNets", 2015, arXiv:1412.6550, for outputs inside the network.
    """
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"Expected `steps` to be an integer >= 1. Received: steps={steps!r}")
    check_examples(data, "data")
    for model in (small, original):
        check_is_model(model)
    if _backend.backend_of(small) is not _backend.backend_of(original):
        raise ValueError(
            "Expected both models to be of Keras 3, or both of tf_keras. "
            f"Received: {type(small).__module__}.{type(small).__name__} and "
            f"{type(original).__module__}.{type(original).__name__}"
        )
    with alone(small, original):
        source = Examples(small, data, DEFAULT_EXAMPLES, "data")
        return refined(small, original, source, int(steps), verbose=verbose)


def refined(
    small: Any,
    original: Any,
    examples: Examples | KeptExamples,
    steps: int,
    *,
    verbose: int = 1,
) -> Refinement:
    """`refine` with checked arguments."""
    _check_refinable(small)
    variables = _trained_variables(small)
    theirs = {id(weight) for weight in original.weights}
    if any(id(variable) in theirs for variable in variables):
        raise ValueError(
            f"Expected `original` to have weights of its own. Received: '{original.name}', which "
            f"shares weights with '{small.name}'. Refine a copy that `compress` makes."
        )
    models = small, original
    with contextlib.ExitStack() as stack:
        for context in (*map(passing, models), *map(same_noise, models)):
            stack.enter_context(context)
        fixed = fixed_batch_size(small) is not None
        split = Split(examples, examples.total, by_batch=fixed)
        judge = _Judge(small, original, split)
        loop = _Loop(small, original, variables, split, judge)
        with progress_bar(verbose) as progress:
            task = progress.add_task("refinement", total=steps)
            return loop.run(0 if judge.is_random else steps, lambda: progress.advance(task))


# -- Checks ----------------------------------------------------------------------------------------


def steps_of(refine: object, data: object) -> int | None:
    """The steps that an argument `refine` stands for, None for no refinement.

    Raises:
        ValueError: If it is no boolean or positive integer, or the data are no examples.
    """
    if refine is False:
        return None
    if not isinstance(refine, numbers.Integral) or refine < 1:
        raise ValueError(
            "Expected `refine` to be True, False or the largest number of steps, an integer >= 1. "
            f"Received: refine={refine!r}"
        )
    check_examples(data, "calibration_data")
    return STEPS if refine is True else int(refine)


def check_examples(data: object, argument: str, purpose: str = "a refinement") -> None:
    """Raises a ValueError if there are no examples for a purpose."""
    if data is None or isinstance(data, CalibrationStats):
        raise ValueError(
            f"Expected examples as `{argument}`, for {purpose} to run the models on. "
            f"Received: {argument} of type {type(data).__name__}"
        )


def _check_refinable(small: Any) -> None:
    """Raises a ValueError if a model has nothing to train, or layers that cannot be trained."""
    for path, layer in walk(small):
        if (reason := wrappers.refusal(layer)) is not None:
            raise ValueError(
                f"Expected a model without layers that TF-MOT clusters or quantizes. Received: "
                f"the layer '{path}', and {reason}"
            )
    if not _trained_variables(small):
        raise ValueError(
            f"Expected the model '{small.name}' to have factors, biases or normalizations that "
            "are not frozen. Received: none. Set `trainable = True` where they may be trained."
        )


def _trained_variables(small: Any) -> list[Any]:
    """The variables that a refinement trains: factors, biases, scales; else all of them."""
    backend = _backend.backend_of(small)
    layers = [layer for _, layer in walk(small) if is_factorized(layer)]
    factors = {id(v) for layer in layers for v in backend.own_variables(layer)}
    return [
        v
        for v in small.trainable_variables
        if tensors.is_floating(v)
        and (not factors or id(v) in factors or len(v.shape) <= 1 or "bias" in v.name)
    ]


# -- What judges it --------------------------------------------------------------------------------


class _Judge:
    """Measures how far outputs are from the original's on the examples held out.

    Images are judged in shifted and flipped copies too: the original examples may be those that the
    factors were fitted to, and more examples are less noise.

    Attributes:
        kinds: What each output is.
        augmented: How images may be changed.
        start: The distance of the model's outputs at first.
    """

    def __init__(self, small: Any, original: Any, split: Split) -> None:
        self._split = split
        self.augmented: tuple[str, ...] = ()
        self._copies = 0
        self._small, self._original = map(_Runner, (small, original))
        wanted = self._outputs(self._original)
        if not all(np.isfinite(y).all() for y in wanted if y.dtype.kind == "f"):
            raise ValueError(
                f"Expected finite outputs of the model '{original.name}' on the data. "
                "Received: NaN or infinity"
            )
        once, again = (self._original(itertools.islice(split.held, 1)) for _ in range(2))
        random = differing(once, again)
        self._reference = Reference(original, wanted, random)
        self.kinds = self._reference.kinds
        found = self._outputs(self._small)
        shapes = [[y.shape[1:] for y in outputs] for outputs in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "Expected both models to have outputs of the same shapes. "
                f"Received: {shapes[0]} and {shapes[1]}"
            )
        self._reference.check_gradients(small.name)
        if image_axes(next(split.held)) is not None:
            self.augmented = ("shift", "flip") if self._allows_flips() else ("shift",)
            if sum(y.size for y in wanted) <= _MOST_ENTRIES:
                self._copies = _COPIES
                self._reference = Reference(original, self._outputs(self._original), random)
        self.start = self.look()

    @property
    def is_random(self) -> bool:
        """Whether all outputs of the original are random, so that nothing can be compared."""
        return self._reference.is_random

    def look(self) -> float:
        """The distance of the model's outputs now."""
        return self._reference.distance(self._outputs(self._small))

    def _allows_flips(self) -> bool:
        """Whether mirrored images change the original's outputs hardly more than shifts do."""
        random = np.random.default_rng(0)
        shift, flip = (
            self._reference.distance(self._original(map(change, self._split.held)))
            for change in (lambda x: shifted(x, random), flipped)
        )
        return flip <= _FLIP_FACTOR * shift

    def _outputs(self, run: _Runner) -> list[Array]:
        """The outputs for the examples held out, and always the same changed copies of them."""
        copies = (
            _augmented(batch, self.augmented, random)
            for random in map(np.random.default_rng, range(self._copies))
            for batch in self._split.held
        )
        return run(itertools.chain(self._split.held, copies))


class _Runner:
    """The outputs of a model for batches of inputs."""

    def __init__(self, model: Any) -> None:
        self._model, self._graph = model, Traced(lambda inputs: outputs_of(model, inputs))

    def __call__(self, batches: Iterable[Any]) -> list[Array]:
        with same_noise(self._model):
            found = [[tensors.to_numpy(y) for y in self._graph(batch)] for batch in batches]
        return joined(found)


def _augmented(batch: Any, how: Sequence[str], random: np.random.Generator) -> Any:
    """A batch whose images are changed at random."""
    if "shift" in how:
        batch = shifted(batch, random)
    return flipped(batch, random) if "flip" in how else batch


# -- The training ----------------------------------------------------------------------------------


class _Loop:
    """Trains, looks, and keeps the best weights."""

    def __init__(
        self, small: Any, original: Any, variables: list[Any], split: Split, judge: _Judge
    ) -> None:
        self._split, self._judge = split, judge
        pruning = wrappers.pruning(small)
        wrappers.apply_masks(pruning)
        self._refiner = Refiner(
            small,
            original,
            variables,
            masks={id(weight): mask for w in pruning for weight, mask, _ in w.pruning_vars},
            blocks=shared_blocks(small, original),
            factorized=[layer for _, layer in walk(small) if is_factorized(layer)],
            scores=[_SCORES[kind] for kind in judge.kinds],
        )

    def run(self, steps: int, advance: Any) -> Refinement:
        """Takes at most so many steps."""
        random = np.random.default_rng(0)
        drawn = self._split.drawn(random, _BATCH)
        start = best = after = self._judge.start
        kept, best_step = self._refiner.values(), 0
        step, misses, factor = 0, 0, 1.0
        try:
            while step < steps and misses < _PATIENCE:
                self._step(next(drawn), random, factor * _rate(step, steps))
                step += 1
                advance()
                if step % _LOOK_EVERY == 0 or step == steps:
                    found = self._judge.look()
                    misses += 1
                    if found < start and found <= _ABOUT * best:
                        after, kept, best_step, misses = found, self._refiner.values(), step, 0
                        best = min(best, found)
                    elif misses == _GO_BACK or found > _MUCH_WORSE * best:
                        self._refiner.assign(kept)
                        factor *= _SMALLER
        finally:  # also after an error or an interrupt
            self._refiner.assign(kept)
        return Refinement(step, best_step, start, after, self._split.trained, self._judge.augmented)

    def _step(self, parts: list[tuple[Any, int]], random: np.random.Generator, rate: float) -> None:
        total = sum(count for _, count in parts)
        for batch, count in parts:
            batch = _augmented(batch, self._judge.augmented, random)
            self._refiner.add(batch, count / total)
        self._refiner.step(rate)


def _rate(step: int, steps: int) -> float:
    """The learning rate, which falls to 0 by a cosine."""
    return _RATE * (1 + math.cos(math.pi * step / steps)) / 2
