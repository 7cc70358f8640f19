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
from keras_alds.core.costs import SampledCosts
from keras_alds.litert.layer_files import LayerCall
from keras_alds.targets import TARGETS, canonical

QUANTIZE = (None, "int8")
COLUMNS = (
    *(field.name for field in dataclasses.fields(LayerCall)),
    *("calls", "quantize", "threads", "target", "slices", "rank", "nanoseconds"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Attributes:
        quantize: None for float32, or `"int8"`.
        threads: Number of threads.
        target: The runtime, as `target` of `select`.
        max_slices: Largest number of slices k to measure, or None.

    Raises:
        ValueError: If an attribute is not as above.
    """

    quantize: str | None = None
    threads: int = 1
    target: str = "litert"
    max_slices: int | None = dataclasses.field(default=None, compare=False)  # affects no time

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZE:
            raise ValueError(
                f"Expected `quantize` to be None or 'int8', to measure latency. "
                f"Received: quantize={self.quantize!r}{did_you_mean(self.quantize, QUANTIZE)}"
            )
        positive_int(self.threads, "threads")
        object.__setattr__(self, "target", canonical(self.target))
        if self.target not in TARGETS:
            raise ValueError(
                f"Expected `target` to be one of {', '.join(map(repr, TARGETS))}. "
                f"Received: target={self.target!r}{did_you_mean(self.target, TARGETS)}"
            )
        if self.max_slices is not None:
            positive_int(self.max_slices, "max_slices")

    def ranks(self, layer: Any, call: LayerCall) -> dict[int, tuple[int, ...]]:
        """The ranks that the target allows and that make a layer smaller, by number of slices."""
        rule = functools.partial(TARGETS[self.target].ranks, depthwise=len(set(call.strides)) <= 1)
        shape = tuple(map(int, layer.kernel.shape))
        offered = offered_ranks(shape, rule=rule, max_slices=self.max_slices)
        return {k: tuple(ranks) for k, ranks in offered.items()}

    def row(
        self,
        call: LayerCall | None,
        calls: int = 1,
        slices: int = 0,
        rank: int = 0,
        **columns: Any,
    ) -> dict[str, Any]:
        """A row of a latency table, for a layer's choice or the whole model."""
        return {
            **dict.fromkeys(COLUMNS, ""),
            "kind": "model",
            **(call.to_row() if call is not None else {}),
            "calls": calls,
            "quantize": self.quantize or "float32",
            "threads": self.threads,
            "target": self.target,
            "slices": slices,
            "rank": rank,
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
            for (slices, rank), time in costs.points.items():
                rows.append(settings.row(call, self.calls[call], slices, rank, nanoseconds=time))
        write_rows(path, rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads a table that `save` or the command `latency-read` wrote.

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
        missing = [name for name in COLUMNS if not rows or name not in rows[0]]
        if missing:
            raise ValueError(
                f"Expected a latency table in {where!r}, with the columns {', '.join(COLUMNS)}. "
                f"Received: {'no rows' if not rows else 'none named ' + ', '.join(missing)}"
            )
        totals: list[int] = []
        calls: dict[LayerCall, int] = {}
        points: dict[LayerCall, dict[tuple[int, int], int]] = {}
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
                point = int(row["slices"]), int(row["rank"])
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
