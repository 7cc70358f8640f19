"""`narrow` removes channels inside the blocks of mobile networks, and leaves stock layers."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from keras_alds._backend import wrappers
from keras_alds._backend.layers import KerasModel
from keras_alds.core.calibration.channels import channel_order
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.parallel import threads
from keras_alds.kinds.base import kernel_values
from keras_alds.models.calibration import Calibration
from keras_alds.models.channels import Channels, find_channels
from keras_alds.models.inventory import Inventory, check_is_model, contains_factorized
from keras_alds.models.narrowing import MULTIPLE, Candidate, MacsOfSizes, Narrower, choose_sizes
from keras_alds.models.rebuild import check_symbolic
from keras_alds.models.turns import alone
from keras_alds.naming import check_exclude
from keras_alds.resources import RESOURCES, Cost
from keras_alds.tables import Tabular, TextTable, counted, decimals


@dataclasses.dataclass(frozen=True)
class NarrowedLayer:
    """The channels that one pointwise convolution reads; made by `narrow`.

    Attributes:
        layer: The name of the convolution, or its path inside nested models.
        maker: The name of the convolution that makes the channels.
        before: Their number in the original model.
        after: Their number in the new one.
        error: The relative squared error of the layer's outputs on the examples, estimated.
    """

    layer: str
    maker: str
    before: int
    after: int
    error: float


@dataclasses.dataclass(frozen=True, repr=False)
class Narrowing(Tabular):
    """What `narrow` has made; `summary()` prints it.

    Attributes:
        name: The model's name.
        model: The new model.
        macs: Multiply–accumulates, as `Cost(before, after)`.
        layers: A `NarrowedLayer` for every group of channels, in the order of the model.
        skipped: `{path: reason}` of pointwise convolutions after a depthwise one whose channels
            stay.

    """

    name: str
    model: Any
    macs: Cost
    layers: tuple[NarrowedLayer, ...]
    skipped: dict[str, str]

    def __repr__(self) -> str:
        return f"<Narrowing of {self.name!r}: {self._statement()}. summary() shows all>"

    def to_rows(self) -> list[dict[str, Any]]:
        """The layers as dicts."""
        return [dataclasses.asdict(layer) for layer in self.layers]

    def _table(self) -> TextTable:
        rows = [
            [layer.layer, layer.maker, f"{layer.before} → {layer.after}", decimals(layer.error)]
            for layer in self.layers
        ]
        lines = [self._statement()]
        lines += [f"Not narrowed: {path}: {reason}" for path, reason in self.skipped.items()]
        columns = ["Layer that reads", "Layer that makes", "Channels", "Error"]
        return TextTable(f"Channels of {self.name!r}", columns, rows, lines)

    def _statement(self) -> str:
        info = RESOURCES["macs"]
        return f"{info.total} {info.text(self.macs)}, {self.macs.removed:.2%} removed"


def narrow(
    model: KerasModel,
    cr: float,
    *,
    calibration_data: Any,
    exclude: Any = (),
    verbose: int = 1,
) -> Narrowing:
    """Removes channels between the convolutions of mobile blocks; `model` is not changed.

    A block of MobileNet, EfficientNet-Lite and the like is a convolution that makes channels, a
    depthwise convolution that filters each, and a 1×1 convolution that reads them. For its 1×1
    convolutions, two factors are rarely faster than one kernel. Fewer channels are: all three
    layers shrink, and no layer is added. The new model has the layers, names and graph of `model`,
    and only stock layers. Compress it afterwards, refine it with `refine(small, model, x)`, or
    convert it, as any other model.

    Channels go one after the other, always the one whose loss the others make up for best, by least
    squares on the examples. The kernel of the 1×1 convolution is fitted anew, and gets a bias if it
    had none. Numbers of channels are multiples of 8, chosen for the least sum of what the layers'
    errors do to the model's outputs. Channels that are the same for all examples, of which trained
    networks often have many, go first.

    Args:
        model: A built Functional or Sequential model of Keras 3 or tf_keras.
        cr: Float, 0 <= cr < 1. The fraction of the model's multiply–accumulates to remove (see
            `count_macs`). More is removed where it costs nothing; with 0, only that.
        calibration_data: A few hundred unlabelled examples, or `CalibrationStats`; as for
            `select`.
        exclude: As for `select`: pointwise convolutions whose channels stay.
            Defaults to none.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Returns:
        A `Narrowing`, which holds the new model.

    Raises:
        ValueError: If `cr` is not such a number, or more than can be removed; if `model` is not a
            built Functional or Sequential model, is compressed already, or has no such blocks; or
            for the reasons of `select`, if the data do not fit the model.

    Example:
    ```python
    inputs = keras.Input((12, 12, 3))
    y = keras.layers.Conv2D(32, 3, activation="relu", name="expand")(inputs)
    y = keras.layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(y)
    y = keras.layers.Conv2D(8, 1, name="project")(y)
    block = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(y))
    result = keras_alds.narrow(block, 0.2, calibration_data=x, verbose=0)
    result.summary()
    result.model.save("narrow.keras")
    ```

    References:
        Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon",
        NeurIPS 1992: the error that a removal adds, once the rest is fitted again.
    """
    _check_cr(cr)
    check_is_model(model)
    backend = check_symbolic(model, "narrow")
    wrappers.check_stripped(model, "narrow")
    if contains_factorized(model):
        raise ValueError(
            f"Expected a model that is not compressed, to narrow it. Received: '{model.name}', "
            "which has factorized layers. Narrow first, and compress the result."
        )
    with alone(model):
        inventory = Inventory.of(model, check_exclude(exclude))
        inventory.warn_of_unmatched(stacklevel=2)
        candidates, skipped = _candidates(inventory, calibration_data, verbose, stacklevel=2)
        macs = MacsOfSizes(inventory, candidates)
        sizes, left = choose_sizes(candidates, macs, cr)
        cost = Cost(macs.total, round(left))
        if cost.removed < cr - 1e-9:
            raise ValueError(
                f"Expected `cr` to be at most {cost.removed:.4f}, the part of the "
                "multiply–accumulates that narrowing can remove from the model "
                f"'{model.name}'. Received: cr={cr:g}"
            )
        chosen = list(zip(candidates, sizes, strict=True))
        rebuilder = Narrower(backend, chosen)
        small = rebuilder.rebuild(model)
        backend.copy_compile_state(model, small, rebuilder.pairs(), stacklevel=2)
    layers = tuple(
        NarrowedLayer(
            candidate.channels.path,
            candidate.channels.maker.name,
            candidate.channels.count,
            size,
            float(candidate.order.errors[size]),
        )
        for candidate, size in chosen
    )
    return Narrowing(model.name, small, cost, layers, skipped)


def _candidates(
    inventory: Inventory, data: Any, verbose: int, *, stacklevel: int
) -> tuple[list[Candidate], dict[str, str]]:
    """The channels that can be removed, in which order, and why others stay."""
    found, skipped = find_channels(inventory)
    for channels in found:
        if channels.count <= MULTIPLE:
            skipped[channels.path] = f"it reads {counted(channels.count, 'channel')} only"
    found = [channels for channels in found if channels.path not in skipped]
    calibration = Calibration.of(inventory, data, stacklevel=stacklevel + 1)
    measured: list[tuple[Channels, SecondMoment, Curve | None]] = []
    if found:
        stats = calibration.collected(inventory, verbose=verbose, stacklevel=stacklevel + 1)
        records = {record.path: record for record in stats.match(inventory).records}
        for channels in found:
            record = records[channels.path]
            if record.moment is None:
                detail = record.skipped and record.skipped.detail
                skipped[channels.path] = detail or "no example reached it"
            elif record.moment.block_count > 1:
                skipped[channels.path] = f"it reads {counted(channels.count, 'channel')}, too many"
            else:
                measured.append((channels, record.moment, record.curve))
    if not measured:
        reasons = "".join(f" '{path}': {reason}." for path, reason in skipped.items())
        raise ValueError(
            "Expected a model with channels that a convolution makes, a depthwise convolution "
            f"filters and a 1×1 convolution reads. Received: '{inventory.model.name}', which has "
            f"none to narrow.{reasons}"
        )
    with threads() as pool:
        return list(pool.map(lambda parts: _candidate(*parts), measured)), skipped


def _candidate(channels: Channels, moment: SecondMoment, curve: Curve | None) -> Candidate:
    order = channel_order(kernel_values(channels.reader)[0, 0], moment)
    return Candidate(channels, moment, order, curve)


def _check_cr(cr: Any) -> None:
    if isinstance(cr, bool) or not isinstance(cr, numbers.Real) or not 0 <= float(cr) < 1:
        raise ValueError(
            "Expected `cr`, the fraction of multiply–accumulates to remove, to be a number with "
            f"0 <= cr < 1. Received: cr={cr!r}"
        )
