"""Chooses the widths of attention's heads, and rebuilds the model with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.solvers import min_sum
from keras_alds.kinds.attention import Attention, projections
from keras_alds.kinds.base import below, stock_kind
from keras_alds.models.curves import PROBED_ERRORS
from keras_alds.models.heads import Heads, Product
from keras_alds.models.inventory import Inventory
from keras_alds.models.probes import Prober
from keras_alds.models.rebuild import GraphRebuilder
from keras_alds.models.trials import EQUAL, WEIGHINGS
from keras_alds.resources import allowed_after, removed_fraction, rounded_down

#: A product and its new width.
Choice = tuple[Product, int]
# The error of outputs that counts as none, and the steps of the bisection that looks for
# it. With more, two transformers lost more than `compress` did, with much less they gained less.
_NEAR, _HALVINGS = 5e-4, 6


def find_heads(inventory: Inventory, multiple: int) -> tuple[list[Heads], dict[str, str]]:
    """The attention layers whose heads can be narrower, and by path why others keep theirs.

    Raises:
        ValueError: If there is none.
    """
    found, skipped = [], {}
    records = {record.layer: record for record in inventory.records}
    for path, layer in inventory.layers:
        kind = stock_kind(layer)
        if not isinstance(kind, Attention):
            continue
        parts = {name: records[dense] for name, dense in projections(layer).items()}
        heads = Heads(path, layer, kind, parts)
        reason = _obstacle(inventory, path, layer, kind, parts)
        if any(record.excluded for record in parts.values()):
            reason = "it is excluded"
        elif reason is None and not heads.are_wider(multiple):
            reason = f"its heads are not wider than {multiple}"
        if reason is None:
            found.append(heads)
        else:
            skipped[path] = reason
    if not found:
        listed = "; ".join(f"'{path}': {reason}" for path, reason in skipped.items())
        raise ValueError(
            "Expected a model with `MultiHeadAttention` or `GroupQueryAttention` layers whose "
            f"heads can be narrower. Received: '{inventory.model.name}' "
            f"({listed or 'no such layer'})"
        )
    return found, skipped


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


class HeadWidths:
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
            prober = Prober(inventory.model, layers, batches)
            if not prober.reference.is_random:
                self._prober, weighings = prober, dict(WEIGHINGS)
                curves = [_curve(product, prober) for product in products]
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
                f"Expected 0 < cr <= {rounded_down(self.most)} for the model '{self._name}': "
                f"narrower heads cannot remove more. Received: cr={cr}. Call `compress` for the "
                "rest."
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

    def params(self, choices: Sequence[Choice]) -> int:
        """The parameters that the model has with some widths."""
        gone = (product.per_width * (product.widths[-1] - width) for product, width in choices)
        return self._params - sum(gone)

    def free(self) -> list[Choice]:
        """The widths that remove most with outputs that are practically the same."""
        best = [(product, product.widths[-1]) for product in self._products]
        low, high = 0.0, self.most
        for _ in range(_HALVINGS):
            choices, found = self.removing((low + high) / 2)
            if found <= _NEAR:
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


class HeadNarrower(GraphRebuilder):
    """Copies a model with other widths of heads."""

    def __init__(self, backend: _backend.Backend, choices: Sequence[Choice]) -> None:
        super().__init__(backend, backend)
        self._arguments: dict[Any, dict[str, int]] = {}
        self._narrowed: dict[int, Any] = {}
        for product, width in choices:
            if width < product.widths[-1]:
                self._arguments.setdefault(product.heads.layer, {})[product.argument] = width
                self._narrowed.update(product.narrowed(width))

    def changed(self, layer: Any) -> tuple[dict[str, Any], list[np.ndarray], list[Any]]:
        """As for `GraphRebuilder`."""
        changes, values, weights = super().changed(layer)
        values = [
            self._narrowed.get(id(variable), old).astype(old.dtype)
            for variable, old in zip(weights, values, strict=True)
        ]
        return {**changes, **self._arguments.get(layer, {})}, values, weights
