"""`narrow` and `narrow_heads`: fewer channels and narrower heads; all layers stay stock layers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds._backend.layers import KerasModel
from keras_alds.core.calibration.channels import channel_order
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.checks import positive_int
from keras_alds.core.parallel import threads
from keras_alds.kinds.base import kernel_values
from keras_alds.models.calibration import Calibration, CalibrationStats
from keras_alds.models.channels import Channels, find_channels
from keras_alds.models.choices import check_kernels
from keras_alds.models.head_widths import HeadNarrower, HeadWidths, find_heads
from keras_alds.models.heads import Product
from keras_alds.models.inventory import Inventory, check_is_model, contains_factorized
from keras_alds.models.narrowing import Candidate, MacsOfSizes, Narrower, choose_sizes
from keras_alds.models.rebuild import GraphRebuilder, check_symbolic
from keras_alds.models.turns import alone
from keras_alds.naming import check_exclude
from keras_alds.options import check_cr
from keras_alds.resources import RESOURCES, Cost, rounded_down
from keras_alds.tables import Tabular, TextTable, counted, decimals


@dataclasses.dataclass(frozen=True)
class NarrowedLayer:
    """What `narrow` or `narrow_heads` made narrower; a width can also stay as it was.

    Attributes:
        layer: The name of the 1×1 convolution or attention layer, or its path inside nested models.
        width: What became smaller: `"channels of 'expand'"`, which the layer reads and the
            convolution `expand` makes; or an argument of attention, such as `"key_dim"`.
        before: The width in the original model.
        after: The width in the new one.
        error: The relative squared error of what is computed with it, estimated: of the outputs of
            the convolution, or of the products of each head.
    """

    layer: str
    width: str
    before: int
    after: int
    error: float


@dataclasses.dataclass(frozen=True, repr=False)
class Narrowing(Tabular):
    """What `narrow` or `narrow_heads` has made; `summary()` prints it.

    Attributes:
        name: The model's name.
        model: The new model.
        resource: What `cr` counts: `"macs"` of `narrow`, `"params"` of `narrow_heads`.
        cost: How much of it the models need, as `Cost(before, after)`.
        layers: A `NarrowedLayer` for every width, in the order of the model.
        skipped: `{path: reason}` of the layers that stay: pointwise convolutions after a depthwise
            one, or attention layers.
    """

    name: str
    model: Any
    resource: str
    cost: Cost
    layers: tuple[NarrowedLayer, ...]
    skipped: dict[str, str]

    def __repr__(self) -> str:
        return f"<Narrowing of {self.name!r}: {self._statement()}. summary() shows all>"

    def to_rows(self) -> list[dict[str, Any]]:
        """The layers as dicts."""
        return [dataclasses.asdict(layer) for layer in self.layers]

    def _table(self) -> TextTable:
        rows = [
            [layer.layer, layer.width, f"{layer.before} → {layer.after}", decimals(layer.error)]
            for layer in self.layers
        ]
        lines = [self._statement()]
        lines += [f"Not narrowed: {path}: {reason}" for path, reason in self.skipped.items()]
        return TextTable(
            f"Widths of {self.name!r}", ["Layer", "Width", "Size", "Error"], rows, lines
        )

    def _statement(self) -> str:
        info = RESOURCES[self.resource]
        return f"{info.total} {info.text(self.cost)}, {self.cost.removed:.2%} removed"


def narrow(
    model: KerasModel,
    cr: float | None = None,
    *,
    calibration_data: Any,
    exclude: Any = (),
    multiple: int = 8,
    verbose: int = 1,
) -> Narrowing:
    """Removes channels between the convolutions of mobile blocks; `model` is not changed.

    A block of MobileNet, EfficientNet-Lite and the like is a convolution that makes channels, a
    depthwise convolution that filters each, and a 1×1 convolution that reads them. For its 1×1
    convolutions, two factors are rarely faster than one kernel. Fewer channels are: all three
    layers shrink, and no layer is added. The new model has the layers, names and graph of `model`,
    and only stock layers. Compress it afterwards, refine it with `refine(small, model, x)`, or
    convert it, as any other model. For the heads of attention, there is `narrow_heads`.

    Channels go one after the other, each time the channel that the remaining ones replace best, by
    least squares on the examples. The kernel of the 1×1 convolution is fitted anew, and gets a bias
    if it had none. Their numbers are chosen for the least sum of what the layers' errors do to the
    model's outputs. Channels that are the same for all examples, of which trained networks often
    have many, go first.

    Args:
        model: A built Functional or Sequential model of Keras 3 or tf_keras.
        cr: Float, 0 < cr < 1, or None. The fraction of the model's multiply–accumulates to remove
            (see `count_macs`); that of `narrow_heads` counts parameters. More is removed where it
            costs nothing. Defaults to None: only channels whose removal changes nothing but
            rounding.
        calibration_data: A few hundred unlabelled examples, or `CalibrationStats`; as for
            `select`.
        exclude: As for `select`: pointwise convolutions whose channels stay.
            Defaults to none.
        multiple: Integer. Numbers of channels are multiples of it, as processors compute them in
            groups. Defaults to 8.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Returns:
        A `Narrowing`, which holds the new model. It is compiled as `model` is, with a fresh
        optimizer. A warning says if nothing got narrower.

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
    if cr is not None:
        check_cr(cr)
    wanted = float(cr or 0)
    multiple = positive_int(multiple, "multiple")
    backend = _checked_model(model, "narrow")
    if contains_factorized(model):
        raise ValueError(
            f"Expected a model that is not compressed, to narrow it. Received: '{model.name}', "
            "which has factorized layers. Narrow first, and compress the result."
        )
    with alone(model):
        inventory = Inventory.of(model, check_exclude(exclude))
        inventory.warn_of_unmatched(stacklevel=2)
        check_kernels(inventory.candidates)
        candidates, skipped = _candidates(
            inventory, calibration_data, multiple, verbose, stacklevel=2
        )
        macs = MacsOfSizes(inventory, candidates)
        sizes, left = choose_sizes(candidates, macs, wanted)
        cost = Cost(macs.total, round(left))
        if cost.removed < wanted - 1e-9:
            raise ValueError(
                f"Expected `cr` to be at most {rounded_down(cost.removed)}, the part of the "
                "multiply–accumulates that narrowing can remove from the model "
                f"'{model.name}'. Received: cr={wanted:g}"
            )
        chosen = list(zip(candidates, sizes, strict=True))
        rows = [_narrowed_channels(candidate, size) for candidate, size in chosen]
        small = _made(Narrower(backend, chosen), model, rows, stacklevel=2)
    return Narrowing(model.name, small, "macs", cost, tuple(rows), skipped)


def _candidates(
    inventory: Inventory, data: Any, multiple: int, verbose: int, *, stacklevel: int
) -> tuple[list[Candidate], dict[str, str]]:
    """The channels that can be removed, in which order, and why others stay."""
    found, skipped = find_channels(inventory)
    for channels in found:
        if channels.count <= multiple:
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
        return list(
            pool.map(lambda parts: _candidate(*parts, multiple=multiple), measured)
        ), skipped


def _candidate(
    channels: Channels, moment: SecondMoment, curve: Curve | None, *, multiple: int
) -> Candidate:
    order = channel_order(kernel_values(channels.reader)[0, 0], moment)
    return Candidate(channels, moment, order, curve, multiple)


def _narrowed_channels(candidate: Candidate, size: int) -> NarrowedLayer:
    channels, error = candidate.channels, float(candidate.order.errors[size])
    width = f"channels of '{channels.maker.name}'"
    return NarrowedLayer(channels.path, width, channels.count, size, error)


def narrow_heads(
    model: KerasModel,
    cr: float | None = None,
    *,
    calibration_data: Any = None,
    exclude: Any = (),
    multiple: int = 4,
    verbose: int = 1,
) -> Narrowing:
    """Makes the heads of attention layers narrower; `model` is not changed.

    Queries and keys of a head are multiplied with each other, and values with the output
    projection. The best approximation of each product by narrower heads has a closed form. So
    `key_dim` and `value_dim` of a `MultiHeadAttention` become smaller, or `head_dim` of a
    `GroupQueryAttention`, and nothing else changes: the layers stay stock layers, files load
    without keras_alds, and attention gets faster too. All other layers are copied. For the channels
    of convolutions, there is `narrow`.

    Call it before `compress`, which then has less to remove from each layer. Heads of half the
    width often lose nothing; docs/results/data.md has figures.

    Left alone are attention layers of your own classes, those inside layers of
    your own, and those with a projection that cannot be factorized. Gated heads keep their values.

    Args:
        model: A built Functional or Sequential model of Keras 3 or tf_keras.
        cr: Float, 0 < cr < 1, or None. The fraction of all the model's parameters to remove; that
            of `narrow` counts multiply–accumulates. The error says how much is in reach. Defaults
            to None: as much as keeps the relative squared error of the outputs on held-out examples
            at 0.0005 or less (for scores and probabilities, that of logits). This needs examples.
        calibration_data: As for `compress`. The products are then approximated on these examples,
            and the width of each layer's heads is chosen by what it does to the model's outputs.
            Defaults to None: by the weights alone.
        exclude: Attention layers to leave as they are; as for `select`. Defaults to none.
        multiple: Integer. Widths are multiples of it, which suits vector units. Defaults to 4.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Returns:
        A `Narrowing`, which holds the new model. It is compiled as `model` is, with a fresh
        optimizer. A warning says if nothing got narrower.

    Raises:
        ValueError: If an argument is invalid or missing, if `model` is not built or is a subclassed
            model, if it has no attention layer whose heads can be narrower, or if `cr` is not
            reachable.

    Example:
    ```python
    inputs = keras.Input((6, 32))
    outputs = keras.layers.MultiHeadAttention(2, 16)(inputs, inputs)
    transformer = keras.Model(inputs, outputs)
    result = keras_alds.narrow_heads(transformer, 0.4)
    result.summary()
    result.model.save("narrow.keras")
    ```

    References:
        Wong et al., "A3: an Analytical Low-Rank Approximation Framework for Attention", 2025,
        arXiv:2505.12942.
    """
    if cr is not None:
        check_cr(cr)
    multiple = positive_int(multiple, "multiple")
    backend = _checked_model(model, "narrow_heads")
    if cr is None and (calibration_data is None or isinstance(calibration_data, CalibrationStats)):
        raise ValueError(
            "Expected `cr`, or examples as `calibration_data` to judge the outputs on. Received: "
            f"cr=None, calibration_data of type {type(calibration_data).__name__}"
        )
    with alone(model):
        inventory = Inventory.of(model, check_exclude(exclude))
        inventory.warn_of_unmatched(stacklevel=2)
        check_kernels(inventory.candidates)
        found, skipped = find_heads(inventory, multiple)
        batches: list[Any] = []
        if calibration_data is not None:
            calibration = Calibration.of(inventory, calibration_data, stacklevel=2)
            stats = calibration.collected(inventory, curves=False, verbose=verbose, stacklevel=2)
            found, skipped = find_heads(stats.match(inventory), multiple)
            batches = calibration.judging()
        products = [product for heads in found for product in heads.products(multiple)]
        widths = HeadWidths(inventory, products, batches)
        choices = widths.free() if cr is None else widths.removing(cr)[0]
        rows = [_narrowed_heads(*choice) for choice in choices]
        small = _made(HeadNarrower(backend, choices), model, rows, stacklevel=2)
        cost = Cost(inventory.params, widths.params(choices))
    return Narrowing(model.name, small, "params", cost, tuple(rows), skipped)


def _narrowed_heads(product: Product, width: int) -> NarrowedLayer:
    error = float(product.errors[product.widths.index(width)])
    heads = product.heads
    return NarrowedLayer(heads.path, product.argument, product.widths[-1], width, error)


# -- What both do ----------------------------------------------------------------------------------


def _checked_model(model: Any, user: str) -> _backend.Backend:
    """The backend of a built Functional or Sequential model.

    Raises:
        ValueError: If it is anything else.
    """
    check_is_model(model)
    backend = check_symbolic(model, user)
    wrappers.check_stripped(model, user)
    return backend


def _made(
    rebuilder: GraphRebuilder, model: Any, rows: Iterable[NarrowedLayer], *, stacklevel: int
) -> Any:
    """The new model. A warning says if it is a copy."""
    new = rebuilder.rebuild(model, stacklevel=stacklevel + 1)
    backend = rebuilder.source
    backend.copy_compile_state(model, new, rebuilder.pairs(), stacklevel=stacklevel + 1)
    if all(row.before == row.after for row in rows):
        warnings.warn(
            f"Nothing in '{model.name}' can be narrower for free: the new model is a copy. Pass a "
            "fraction as `cr` to narrow it all the same.",
            stacklevel=stacklevel + 1,
        )
    return new
