"""`narrow_heads`: attention layers with narrower heads, which stay stock layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds._backend.layers import KerasModel
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.checks import positive_int
from keras_alds.core.solvers import min_sum
from keras_alds.kinds.attention import Attention, projections
from keras_alds.kinds.base import below, stock_kind
from keras_alds.models.calibration import Calibration, CalibrationStats
from keras_alds.models.curves import PROBED_ERRORS
from keras_alds.models.heads import Heads, Product
from keras_alds.models.inventory import Inventory
from keras_alds.models.probes import Prober
from keras_alds.models.rebuild import GraphRebuilder, Piece, check_symbolic
from keras_alds.models.trials import EQUAL, WEIGHINGS
from keras_alds.models.turns import alone
from keras_alds.naming import check_exclude
from keras_alds.options import check_cr
from keras_alds.resources import allowed_after, removed_fraction

#: A product and its new width.
Choice = tuple[Product, int]
# The error of outputs that is allowed without `cr`, and the steps of the bisection that looks for
# it. With more, two transformers lost more than `compress` did, with much less they gained less.
_NEAR, _HALVINGS = 5e-4, 6


def narrow_heads(
    model: KerasModel,
    cr: float | None = None,
    *,
    calibration_data: Any = None,
    exclude: Any = (),
    width_multiple: int = 4,
) -> KerasModel:
    """Returns a new model whose attention layers have narrower heads; `model` is not changed.

    Queries and keys of a head are multiplied with each other, and values with the output
    projection. The best approximation of each product by narrower heads has a closed form. So
    `key_dim` and `value_dim` of a `MultiHeadAttention` become smaller, or `head_dim` of a
    `GroupQueryAttention`, and nothing else changes: the layers stay stock layers, files load
    without keras_alds, and attention gets faster too. All other layers are copied.

    Call it before `compress`, which then has less to remove from each layer. Heads of half the
    width often lose nothing; docs/results.md has figures.

    Left alone, with a warning, are attention layers of your own classes, those inside layers of
    your own, and those with a projection that cannot be factorized. Gated heads keep their values.

    Args:
        model: A built Functional or Sequential model of Keras 3 or tf_keras.
        cr: Float, 0 < cr < 1, or None. The fraction of all the model's parameters to remove. The
            error says how much is in reach. Defaults to None: as much as leaves a relative
            squared error of 0.0005 in the outputs on held-out examples (for scores and
            probabilities that of logits); this needs examples.
        calibration_data: As for `compress`. The products are then approximated on these examples,
            and the width of each layer's heads is chosen by what it does to the model's outputs.
            Defaults to None: by the weights alone.
        exclude: Attention layers to leave as they are; as for `select`. Defaults to none.
        width_multiple: Integer. Widths are multiples of it, which suits vector units. Defaults
            to 4.

    Returns:
        A new model of the same class, compiled as `model` is, with a fresh optimizer. A warning
        says if no heads got narrower.

    Raises:
        ValueError: If an argument is invalid or missing, if `model` is not built or is a subclassed
            model, if it has no attention layer whose heads can be narrower, or if `cr` is not
            reachable.

    Example:
    ```python
    inputs = keras.Input((6, 32))
    outputs = keras.layers.MultiHeadAttention(2, 16)(inputs, inputs)
    transformer = keras.Model(inputs, outputs)
    narrow = keras_alds.narrow_heads(transformer, 0.4)
    print(narrow.layers[-1].key_dim, narrow.layers[-1].value_dim)  # smaller than 16
    ```

    References:
        Wong et al., "A3: an Analytical Low-Rank Approximation Framework for Attention", 2025,
        arXiv:2505.12942.
    """
    backend = check_symbolic(model, "narrow_heads")
    wrappers.check_stripped(model, "narrow_heads")
    if cr is not None:
        check_cr(cr)
    elif calibration_data is None or isinstance(calibration_data, CalibrationStats):
        raise ValueError(
            "Expected `cr`, or examples as `calibration_data` to judge the outputs on. Received: "
            f"cr=None, calibration_data of type {type(calibration_data).__name__}"
        )
    multiple = positive_int(width_multiple, "width_multiple")
    excluded = check_exclude(exclude)
    with alone(model):
        inventory = Inventory.of(model, excluded)
        inventory.warn_of_unmatched(stacklevel=2)
        found = _found(inventory, stacklevel=2)
        batches: list[Any] = []
        if calibration_data is not None:
            calibration = Calibration.of(inventory, calibration_data, stacklevel=2)
            stats = calibration.collected(inventory, curves=False, stacklevel=2)
            found, batches = _found(stats.match(inventory)), calibration.judging()
        products = [product for heads in found for product in heads.products(multiple)]
        if not products:
            raise ValueError(
                "Expected attention layers with heads wider than `width_multiple`. Received: "
                f"'{model.name}', width_multiple={multiple}"
            )
        widths = _Widths(inventory, products, batches)
        choices = widths.near(_NEAR) if cr is None else widths.removing(cr)[0]
        if all(width == product.widths[-1] for product, width in choices):
            warnings.warn(
                f"All narrower heads change the outputs of '{model.name}' too much: the new model "
                "is a copy. Pass a fraction as `cr` to narrow them all the same.",
                stacklevel=2,
            )
        rebuilder = _Narrower(backend, choices)
        new = rebuilder.rebuild(model)
        backend.copy_compile_state(model, new, rebuilder.pairs(), stacklevel=2)
        return new


def _found(inventory: Inventory, *, stacklevel: int = 0) -> list[Heads]:
    """The attention layers whose heads can be narrower.

    Args:
        inventory: The model.
        stacklevel: The frame that a warning of the others names; 1 is the caller of this function.
            Defaults to 0: no warning.

    Raises:
        ValueError: If there is none.
    """
    found, others = [], {}
    records = {record.layer: record for record in inventory.records}
    for path, layer in inventory.layers:
        kind = stock_kind(layer)
        if not isinstance(kind, Attention):
            continue
        parts = {name: records[dense] for name, dense in projections(layer).items()}
        if any(record.excluded for record in parts.values()):
            continue
        reason = _obstacle(inventory, path, layer, kind, parts)
        if reason is None:
            found.append(Heads(layer, kind, parts))
        else:
            others[path] = reason
    listed = "; ".join(f"'{path}': {reason}" for path, reason in others.items())
    if not found:
        raise ValueError(
            "Expected a model with `MultiHeadAttention` or `GroupQueryAttention` layers whose "
            f"heads can be narrower. Received: '{inventory.model.name}' "
            f"({listed or 'none that is not excluded'})"
        )
    if listed and stacklevel:
        warnings.warn(
            f"These attention layers keep their heads: {listed}.", stacklevel=stacklevel + 1
        )
    return found


def _obstacle(
    inventory: Inventory, path: str, layer: Any, kind: Attention, parts: Any
) -> str | None:
    """Why the heads of an attention layer cannot be narrower, or None."""
    for above, holder in inventory.layers:  # a layer of tf_keras may have a "/" in its name
        inside = path.startswith(f"{above}/") and layer in below(holder)
        if inside and not inventory.backend.is_symbolic(holder):
            return f"'{holder.name}' calls it in Python code"
    if (reason := kind.keeps_heads(layer)) is not None:
        return reason
    for name, record in parts.items():
        if record.skipped is not None:
            return f"its {name} projection: {record.skipped.detail}"
    return None


# -- The widths ----------------------------------------------------------------------------------


class _Widths:
    """Chooses the width of every product.

    Args:
        inventory: The model.
        products: What can be narrower.
        batches: Batches of held-out examples; without any, errors are not weighed.
    """

    def __init__(
        self, inventory: Inventory, products: Sequence[Product], batches: Sequence[Any]
    ) -> None:
        self._name, self._params = inventory.model.name, inventory.params
        self._products = products
        self._prober: Prober | None = None
        curves: list[Curve | None] = [None] * len(products)
        weighings = {EQUAL: WEIGHINGS[EQUAL]}
        if batches:
            layers = [layer for product in products for layer in product.kernels(product.widths[0])]
            self._prober = Prober(inventory.model, layers, batches)
            curves = [_curve(product, self._prober) for product in products]
            weighings = dict(WEIGHINGS)
        pairs = list(zip(products, curves, strict=True))
        self._tables = [
            [p.table(curve, power) for p, curve in pairs] for power in weighings.values()
        ]
        dense = sum(int(table.weights.max()) for table in self._tables[0])
        least = sum(int(table.weights.min()) for table in self._tables[0])
        self._fixed = self._params - dense
        self.most = removed_fraction(self._params, self._fixed + least)

    def removing(self, cr: float) -> tuple[list[Choice], float]:
        """The widths that remove a fraction of the parameters, and the error of the outputs.

        Errors are weighed in several ways, as for a plan, and the nearest outputs win.

        Raises:
            ValueError: If that is out of reach.
        """
        if cr > self.most:
            raise ValueError(
                f"cr={cr} is not reachable by narrower heads for the model '{self._name}': "
                f"expected 0 < cr <= {self.most:.4f}. Call `compress` for the rest."
            )
        budget = allowed_after(self._params, cr) - self._fixed
        found = []
        for tables in self._tables:
            rows = min_sum(tables, [budget]).indices
            pairs = zip(self._products, rows, strict=True)
            choices = [(product, product.widths[row]) for product, row in pairs]
            error = 0.0
            if self._prober is not None:
                error = self._prober.error(_kernels(choices))
            found.append((choices, error))
        return min(found, key=lambda trial: trial[1])

    def near(self, error: float) -> list[Choice]:
        """The widths that remove most with outputs of at most this error."""
        best = [(product, product.widths[-1]) for product in self._products]
        low, high = 0.0, self.most
        for _ in range(_HALVINGS):
            choices, found = self.removing((low + high) / 2)
            if found <= error:
                best, low = choices, (low + high) / 2
            else:
                high = (low + high) / 2
        return best


def _kernels(choices: Sequence[Choice]) -> dict[Any, Any]:
    return {
        layer: kernel
        for product, width in choices
        if width < product.widths[-1]
        for layer, kernel in product.kernels(width).items()
    }


def _curve(product: Product, prober: Prober) -> Curve | None:
    """What an error of one product does to the model's outputs, the others being exact."""
    errors = product.errors[:-1]
    known = np.flatnonzero(errors > 0)
    if not known.size:
        return None
    nearest = np.abs(np.log(errors[known])[:, None] - np.log(PROBED_ERRORS)).argmin(axis=0)
    rows = sorted(set(known[nearest].tolist()))
    divergences = [prober.divergence(product.kernels(product.widths[row])) for row in rows]
    return Curve.of([float(errors[row]) for row in rows], divergences)


# -- The new model -------------------------------------------------------------------------------


class _Narrower(GraphRebuilder):
    """Copies a model with other widths of heads."""

    def __init__(self, backend: _backend.Backend, choices: Sequence[Choice]) -> None:
        super().__init__(backend, backend)
        self._arguments: dict[Any, dict[str, int]] = {}
        self._narrowed: dict[int, Any] = {}
        for product, width in choices:
            if width < product.widths[-1]:
                self._arguments.setdefault(product.heads.layer, {})[product.argument] = width
                self._narrowed.update(product.narrowed(width))

    def pieces(self, call: _backend.GraphCall) -> list[Piece]:
        if self.source.is_symbolic(call.layer):
            return [self.model(call.layer)]
        return [self.once(call.layer, "new", lambda: self._like(call.layer))]

    def _like(self, layer: Any) -> Any:
        new = type(layer).from_config({**layer.get_config(), **self._arguments.get(layer, {})})
        if isinstance(layer, self.source.keras.layers.Layer):
            weights = list(layer.weights)
            values = [
                self._narrowed.get(id(variable), old).astype(old.dtype)
                for variable, old in zip(weights, layer.get_weights(), strict=True)
            ]
            self.record(layer, new, values, weights)
        return new
