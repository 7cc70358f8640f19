"""`LatencyTable`: latencies of a model's layers in a runtime, dense and factorized."""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from keras_alds.core.checks import did_you_mean, positive_int
from keras_alds.core.choices import offered_ranks
from keras_alds.core.costs import DENSE, Point, SampledCosts
from keras_alds.core.slicing import SCHEMES
from keras_alds.litert.layer_files import LayerCall
from keras_alds.models.inventory import LayerRecord
from keras_alds.options import check_quantize
from keras_alds.targets import TARGETS, canonical

COLUMNS = (
    *(field.name for field in dataclasses.fields(LayerCall)),
    *("calls", "quantize", "threads", "target", "scheme", "slices", "rank", "nanoseconds"),
)
#: Columns that older files lack, with the value that they have there.
ADDED = {"scheme": "0"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Attributes:
        quantize: None for float32, or `"int8"`.
        threads: Number of threads.
        target: The runtime, as `target` of `select`.
        max_slices: Largest number of slices k to measure, or None.
        schemes: Fold schemes to measure.

    Raises:
        ValueError: If an attribute is not as above.
    """

    quantize: str | None = None
    threads: int = 1
    target: str = "litert"
    # These two say what is measured, and affect no time.
    max_slices: int | None = dataclasses.field(default=None, compare=False)
    schemes: tuple[int, ...] = dataclasses.field(default=SCHEMES, compare=False)

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        positive_int(self.threads, "threads")
        object.__setattr__(self, "target", canonical(self.target))
        if self.target not in TARGETS:
            raise ValueError(
                f"Expected `target` to be one of {', '.join(map(repr, TARGETS))}. "
                f"Received: target={self.target!r}{did_you_mean(self.target, TARGETS)}"
            )
        if self.max_slices is not None:
            positive_int(self.max_slices, "max_slices")

    def ranks(self, record: LayerRecord, call: LayerCall) -> dict[tuple[int, int], range]:
        """The ranks that the target allows and that make a layer smaller.

        Args:
            record: The layer.
            call: One of its calls.

        Returns:
            Ranks by number of slices and fold scheme.
        """
        rule = functools.partial(TARGETS[self.target].ranks, depthwise=len(set(call.strides)) <= 1)
        return {
            (k, scheme): ranks
            for scheme in record.folded(self.schemes).schemes
            for k, ranks in offered_ranks(
                record.shape_in(scheme), rule=rule, max_slices=1 if scheme else self.max_slices
            ).items()
        }

    def row(
        self,
        call: LayerCall | None,
        calls: int = 1,
        point: Point = DENSE,
        **columns: Any,
    ) -> dict[str, Any]:
        """A row of a latency table, for a layer's choice or the whole model."""
        return {
            **dict.fromkeys(COLUMNS, ""),
            "kind": "model",
            **(call.to_row() if call is not None else {}),
            **dict(zip(("slices", "rank", "scheme"), point, strict=True)),
            "calls": calls,
            "quantize": self.quantize or "float32",
            "threads": self.threads,
            "target": self.target,
            **columns,
        }


@dataclasses.dataclass(frozen=True, repr=False)
class LatencyTable:
    """Latencies of a model and its layers' choices in one runtime; see `measure_latency`.

    Attributes:
        total: Latency of the whole original model, in nanoseconds.
        layers: `SampledCosts` of every layer and input size, in nanoseconds.
        calls: How often each of these is called in one forward pass.
        quantize: None for float32, or `"int8"`.
        threads: Number of threads.
        target: The runtime, as `target` of `select`.

    Example:
    ```python
    table = keras_alds.litert.measure_latency(model, quantize="int8", verbose=0)
    table.save("latency.csv")
    table = keras_alds.litert.LatencyTable.load("latency.csv")
    # plan = keras_alds.select(model, cr=0.3, objective="latency", latency_table=table)
    ```
    """

    total: int
    layers: Mapping[LayerCall, SampledCosts]
    calls: Mapping[LayerCall, int]
    quantize: str | None = None
    threads: int = 1
    target: str = "litert"

    def __repr__(self) -> str:
        return (
            f"LatencyTable(total={self.total}, layers={{{len(self.layers)} of them}}, "
            f"quantize={self.quantize!r}, threads={self.threads}, target={self.target!r})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to `path` as CSV; docs/deploy.md describes its columns."""
        settings = Settings(self.quantize, self.threads, self.target)
        rows = [settings.row(None, nanoseconds=self.total)]
        for call, costs in self.layers.items():
            for point, time in costs.points.items():
                rows.append(settings.row(call, self.calls[call], point, nanoseconds=time))
        write_rows(path, rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads a table that `save` or the command `latency-read` wrote.

        Files of older versions know fold scheme 0 only.

        Raises:
            ValueError: If the file is not such a table.
        """
        return cls.from_rows(read_rows(path), os.fspath(path))

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], where: str) -> LatencyTable:
        """Makes a table from the rows of a CSV file.

        Raises:
            ValueError: If they are not a latency table.
        """
        rows = [ADDED | dict(row) for row in rows]
        missing = [name for name in COLUMNS if not rows or name not in rows[0]]
        if missing:
            raise ValueError(
                f"Expected a latency table in {where!r}, with the columns {', '.join(COLUMNS)}. "
                f"Received: {'no rows' if not rows else 'none named ' + ', '.join(missing)}"
            )
        totals: list[int] = []
        calls: dict[LayerCall, int] = {}
        points: dict[LayerCall, dict[Point, int]] = {}
        try:
            settings = {(row["quantize"], int(row["threads"]), row["target"]) for row in rows}
            for row in rows:
                nanoseconds = round(float(row["nanoseconds"]))
                if row["kind"] == "model":
                    if nanoseconds < 1:
                        raise ValueError(f"{nanoseconds} ns for the whole model")
                    totals.append(nanoseconds)
                    continue
                call = LayerCall.from_row({key: str(value) for key, value in row.items()})
                calls[call] = int(row["calls"])
                point = int(row["slices"]), int(row["rank"]), int(row["scheme"])
                points.setdefault(call, {})[point] = nanoseconds
            layers = {call: SampledCosts.of_points(found) for call, found in points.items()}
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(
                f"Expected a latency table in {where!r}: numbers in the columns of sizes and "
                f"times, and a dense row for every layer. Received: one that does not fit ({error})"
            ) from error
        if len(settings) != 1 or len(totals) != 1:
            raise ValueError(
                f"Expected the latency table in {where!r} to hold one model, measured with one "
                "quantization, number of threads and target. "
                f"Received: {len(totals)} models, settings {sorted(map(str, settings))}"
            )
        ((quantize, threads, target),) = settings
        return cls(
            totals[0], layers, calls, None if quantize == "float32" else quantize, threads, target
        )


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV; all have the columns of the first."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Reads the rows of a CSV file; returns none if the file is not text."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error):
            return []
