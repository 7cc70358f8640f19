"""`distill=` of `ALDSCompress`: the model before the compression teaches the one after it."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from keras_alds._backend import distilling, refining, tensors
from keras_alds.models.blocks import shared_blocks
from keras_alds.models.data import Examples
from keras_alds.models.inventory import walk
from keras_alds.models.outputs import OutputKind, Reference, differing

_TEMPERATURE = 2.0
# What tells the outputs apart needs no more.
_EXAMPLES = 32


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a user asks for.

    Attributes:
        weight: What to multiply the distance from the teacher by, in the loss.
        temperature: What scores are divided by.
        features: Names or paths of layers to compare too; True for the ends of all blocks.
    """

    weight: float = 1.0
    temperature: float = _TEMPERATURE
    features: Sequence[str] | bool = ()

    @classmethod
    def checked(cls, distill: Any) -> Distillation | None:
        """The argument `distill` of `ALDSCompress`, None for False.

        Raises:
            ValueError: If it is anything else than a boolean, a weight or a dict of options.
        """
        if distill is False or distill is None:
            return None
        if isinstance(distill, Mapping):
            names = [field.name for field in dataclasses.fields(cls)]
            if not distill.keys() <= set(names):
                raise ValueError(_expected(distill))
            found = cls(**distill)
        else:
            found = cls() if distill is True else cls(weight=distill)
        if isinstance(found.features, str):
            found = dataclasses.replace(found, features=(found.features,))
        names_ok = isinstance(found.features, bool) or (
            isinstance(found.features, Sequence)
            and all(isinstance(name, str) for name in found.features)
        )
        if not (_is_positive(found.weight) and _is_positive(found.temperature) and names_ok):
            raise ValueError(_expected(distill))
        return found

    def check(self, model: Any, part: Any, data: Any) -> None:
        """Raises a ValueError if a model cannot be trained so; the arguments are as for `start`."""
        distilling.check_train_step(model)
        _features(part, part, self.features)
        _kinds(part, part, data)

    def start(self, model: Any, part: Any, teacher: Any, data: Any) -> None:
        """Adds the distance from the teacher to the loss of a model that is being trained.

        Args:
            model: The model that is trained.
            part: The model that was compressed, the same or one inside it.
            teacher: A copy of it from before the compression.
            data: Examples of its inputs, which show what its outputs are.
        """
        teacher.trainable = False
        distances = [self._distance(kind) for kind in _kinds(part, teacher, data)]
        features = _features(part, teacher, self.features)
        distiller = distilling.Distiller(part, teacher, distances, features, self.weight)
        distilling.install(model, distiller)

    def _distance(self, kind: OutputKind) -> Any:
        softmax, sigmoid = distilling.softmax_divergence, distilling.sigmoid_divergence
        how = {
            OutputKind.PROBABILITIES: (softmax, refining.centred_logarithms),
            OutputKind.SCORES: (softmax, refining.as_is),
            OutputKind.BINARY: (sigmoid, refining.log_odds),
        }
        if kind in how:
            return distilling.divergence_of(*how[kind], self.temperature)
        return refining.relative_error if kind is OutputKind.VALUES else None


def stop(model: Any) -> None:
    """Ends the distillation of a model."""
    distilling.remove(model)


def _kinds(part: Any, teacher: Any, data: Any) -> tuple[OutputKind, ...]:
    """What the outputs are.

    Raises:
        ValueError: If none has gradients, or the data do not fit.
    """
    inputs, _ = next(iter(Examples(part, data, _EXAMPLES)))
    outputs, again = (
        [tensors.to_numpy(y) for y in refining.outputs_of(teacher, inputs)] for _ in range(2)
    )
    reference = Reference(part, outputs, differing(outputs, again))
    reference.check_gradients(part.name)
    return reference.kinds


def _features(part: Any, teacher: Any, names: Sequence[str] | bool) -> dict[str, tuple[Any, Any]]:
    """The layers to compare, of the model and of its teacher.

    Raises:
        ValueError: If a name is that of no layer or of several.
    """
    if isinstance(names, bool):
        return shared_blocks(part, teacher) if names else {}
    ours, theirs = dict(walk(part)), dict(walk(teacher))
    found = {}
    for name in names:
        paths = [path for path in ours if path == name or path.rpartition("/")[2] == name]
        if name in ours:
            paths = [name]
        if len(paths) != 1 or paths[0] not in theirs:
            raise ValueError(
                "Expected `features` of `distill` to hold names or paths of layers of the model "
                f"'{part.name}'. Received: {name!r}, the name of {len(paths)} layers"
            )
        found[name] = (ours[paths[0]], theirs[paths[0]])
    return found


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and 0 < float(value) < math.inf


def _expected(distill: Any) -> str:
    return (
        "Expected `distill` to be True, False, a weight > 0 in the loss, or a dict of 'weight', "
        "'temperature' (> 0) and 'features' (names of layers, or True for the ends of all "
        f"blocks). Received: distill={distill!r}"
    )
