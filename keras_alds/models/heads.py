"""The products within the heads of an attention layer, which can be narrower.

Their approximations are those of `core.heads`, for the second moments of a layer's inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg

from keras_alds import _backend
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.choices import ChoiceTable
from keras_alds.core.heads import Contexts, Scores
from keras_alds.core.spectra import Float64
from keras_alds.kinds.attention import SCORES, VALUES, Attention
from keras_alds.models.choices import check_finite
from keras_alds.models.inventory import LayerRecord
from keras_alds.models.probes import Kernels
from keras_alds.models.trials import weighed_errors

#: The projections of each product.
_FACTORS = {SCORES: ("query", "key"), VALUES: ("value", "output")}


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """An attention layer whose heads can be narrower.

    Attributes:
        path: Path of the layer.
        layer: The layer.
        kind: Its kind.
        records: The records of its projections by name.
    """

    path: str
    layer: Any
    kind: Attention
    records: Mapping[str, LayerRecord]

    def are_wider(self, multiple: int) -> bool:
        """Whether a width is more than so many."""
        config = self.layer.get_config()
        return any(config[argument] > multiple for argument in self.kind.widths(self.layer))

    def products(self, multiple: int) -> list[Product]:
        """What can be narrower independently, if there are smaller widths."""
        known = {SCORES: self._scores, VALUES: self._contexts}
        found = []
        for argument, parts in self.kind.widths(self.layer).items():
            full = int(self.layer.get_config()[argument])
            widths = (*range(multiple, full, multiple), full)
            made = {part: known[part]() for part in parts}
            found.append(Product(self, argument, widths, made))
        return [product for product in found if len(product.widths) > 1]

    def weights(self, name: str) -> tuple[Float64, Float64 | None]:
        """The kernel and the bias of a projection, `[inputs, heads, width]` and `[heads, width]`.

        The kernel of the output projection is `[heads, width, outputs]`.

        Raises:
            ValueError: If they are not finite.
        """
        dense = self.records[name].layer
        value = _backend.backend_of(dense).value
        kernel = value(dense.kernel).astype(np.float64)
        bias = None if dense.bias is None else value(dense.bias).astype(np.float64)
        for part, values in (("kernel", kernel), ("bias", bias)):
            if values is not None:
                check_finite(values, part, self.records[name].path)
        return (kernel.reshape(*kernel.shape[:2], -1) if name == "output" else kernel), bias

    def _scores(self) -> Scores:
        (q, q_bias), (k, _) = self.weights("query"), self.weights("key")
        second, mean = _moments(self.records["query"])
        queries = np.einsum("ahn,ab,bhm->hnm", q, second, q, optimize=True)
        if q_bias is not None:
            cross = np.einsum("a,ahn,hm->hnm", mean, q, q_bias)
            queries += cross + cross.swapaxes(1, 2) + q_bias[:, :, None] * q_bias[:, None]
        second, mean = _moments(self.records["key"])
        keys = np.einsum("ahn,ab,bhm->hnm", k, second - np.outer(mean, mean), k, optimize=True)
        groups, width = k.shape[1:]
        return Scores(queries.reshape(groups, -1, width, width).sum(axis=1), keys)

    def _contexts(self) -> Contexts:
        kernel = self.weights("output")[0]
        heads, width = kernel.shape[:2]
        moment, record = self._assumed_contexts(heads), self.records["output"]
        if record.moment is not None:
            # ρ stands for contexts of other inputs, which have the form of the assumed ones.
            seen, ridge = record.moment.times(np.eye(heads * width)), record.moment.ridge or 1.0
            seen -= ridge * np.eye(heads * width)
            moment = seen + ridge * heads * width / (np.trace(moment) or 1.0) * moment
        groups = self.weights("value")[0].shape[1]
        return Contexts(moment, kernel.reshape(heads * width, -1), heads, groups)

    def _assumed_contexts(self, heads: int) -> Float64:
        """The second moment of the contexts of independent inputs."""
        rows, bias = self.weights("value")
        if bias is not None:
            rows = np.concatenate([rows, bias[None]])
        blocks = np.repeat(
            rows.transpose(1, 2, 0) @ rows.transpose(1, 0, 2), heads // rows.shape[1], 0
        )
        return np.asarray(scipy.linalg.block_diag(*blocks))


def _moments(record: LayerRecord) -> tuple[Float64, Float64]:
    """Second moment and mean of a layer's inputs; of independent ones if they are not known."""
    moment = record.moment
    if moment is None:
        side = (record.kernel_shape or (1, 1))[0]
        return np.eye(side), np.zeros(side)
    mean = np.zeros(moment.side) if moment.mean is None else moment.mean
    return moment.times(np.eye(moment.side)), mean


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """What one argument of an attention layer makes narrower.

    Attributes:
        heads: The layer.
        argument: The argument, such as `"key_dim"`.
        widths: The widths that it may have; the last one is the layer's own.
        parts: The products that get narrower, by `SCORES` and `VALUES`.
    """

    heads: Heads
    argument: str
    widths: tuple[int, ...]
    parts: Mapping[str, Any]

    @property
    def per_width(self) -> int:
        """The parameters that go with one column of every head."""
        total = 0
        for name in (name for part in self.parts for name in _FACTORS[part]):
            kernel, bias = self.heads.weights(name)
            total += kernel.size
            total += bias.size if bias is not None and name != "output" else 0
        return total // self.widths[-1]

    @functools.cached_property
    def errors(self) -> Float64:
        """The relative squared errors for all widths."""
        return np.array([sum(part.errors[w] for part in self.parts.values()) for w in self.widths])

    def table(self, curve: Curve | None, power: float) -> ChoiceTable:
        """The widths as choices, with weighed errors if there is a curve."""
        widths = np.array(self.widths)
        sizes = widths * self.per_width
        errors = self.errors
        if curve is not None:
            errors = weighed_errors(errors, curve, power)
        zeros = np.zeros_like(widths)
        return ChoiceTable(
            slices=zeros + 1,
            rank=widths,
            full_rank=zeros + widths[-1],
            scheme=zeros,
            weights=sizes,
            cost=sizes[:, None],
            error=errors,
        )

    def kernels(self, width: int) -> Kernels:
        """Kernels of the full width with which the layer computes the same as with a smaller one.

        A key's bias adds the same to all scores of a query, so that it may stay.
        """
        heads, found = self.heads, dict[Any, Float64]()
        if SCORES in self.parts:
            of_query, of_key = self.parts[SCORES].maps(width)
            kernel = heads.weights("key")[0]
            turned = np.einsum("ahn,hnr,hmr->ahm", kernel, of_key, of_query)
            found[heads.records["key"].layer] = turned
        if VALUES in self.parts:
            maps, decoder = self.parts[VALUES].maps(width)
            layer = heads.records["output"].layer
            decoder = decoder.reshape(-1, width, decoder.shape[-1])
            maps = np.repeat(maps, len(decoder) // len(maps), axis=0)
            found[layer] = (maps @ decoder).reshape(layer.kernel.shape)
        return {layer: kernel.astype(np.float32) for layer, kernel in found.items()}

    def narrowed(self, width: int) -> dict[int, Float64]:
        """The new values of variables, by `id`."""
        heads, found = self.heads, dict[int, Float64]()
        maps: dict[str, Float64] = {}
        if SCORES in self.parts:
            # The stock layer divides by the square root of the width.
            scale = (width / self.widths[-1]) ** 0.25
            of_query, of_key = (scale * m for m in self.parts[SCORES].maps(width))
            repeats = heads.weights("query")[0].shape[1] // len(of_query)
            maps = {"query": np.repeat(of_query, repeats, axis=0), "key": of_key}
        if VALUES in self.parts:
            maps["value"], decoder = self.parts[VALUES].maps(width)
            kernel = heads.records["output"].layer.kernel
            shape = (kernel.shape[0], width, *kernel.shape[2:])
            found[id(kernel)] = decoder.reshape(tuple(map(int, shape)))
        for name, m in maps.items():
            dense = heads.records[name].layer
            kernel, bias = heads.weights(name)
            found[id(dense.kernel)] = np.einsum("ahn,hnr->ahr", kernel, m)
            if bias is not None:
                found[id(dense.bias)] = np.einsum("hn,hnr->hr", bias, m)
        return found
