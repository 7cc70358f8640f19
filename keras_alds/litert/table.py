"""`LatencyTable`: latencies of a model's layers in a runtime, dense and factorized."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import os
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keras_alds.core.checks import did_you_mean, positive_int
from keras_alds.core.choices import offered_ranks
from keras_alds.core.costs import DENSE, Point, SampledCosts, sum_costs
from keras_alds.core.slicing import SCHEMES
from keras_alds.litert.layer_files import LayerCall
from keras_alds.litert.timing import Timing
from keras_alds.models.inventory import LayerRecord
from keras_alds.options import check_quantize
from keras_alds.tables import write_csv
from keras_alds.targets import TARGETS, canonical

COLUMNS = (
    *(field.name for field in dataclasses.fields(LayerCall)),
    *("calls", "quantize", "threads", "target", "scheme", "slices", "rank"),
    *(field.name for field in dataclasses.fields(Timing)),
)
#: Columns that older files lack, with the value that they have there.
ADDED = {"scheme": "0", "repeats": "1", "spread": ""}
#: A table whose times are known less well than to this fraction is not worth much.
MOST_NOISE = 0.1


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
        target = TARGETS[self.target]
        return {
            (k, scheme): ranks
            for scheme in record.folded(self.schemes).schemes
            for k, ranks in offered_ranks(
                record.shape_in(scheme),
                rule=record.rule_of(target, scheme),
                max_slices=1 if scheme else self.max_slices,
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
        model: `Timing` of the whole original model: nanoseconds, number of repeats, and spread.
        timings: For every layer and input size, `Timing`s by `(slices, rank, scheme)`;
            `(0, 0, 0)` is the dense layer.
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

    model: Timing
    timings: Mapping[LayerCall, Mapping[Point, Timing]]
    calls: Mapping[LayerCall, int]
    quantize: str | None = None
    threads: int = 1
    target: str = "litert"

    def __repr__(self) -> str:
        return (
            f"LatencyTable(total={self.total}, layers=<{len(self.layers)} layers>, "
            f"quantize={self.quantize!r}, threads={self.threads}, target={self.target!r})"
        )

    @property
    def total(self) -> int:
        """Latency of the whole original model, in nanoseconds."""
        return self.model.nanoseconds

    @functools.cached_property
    def layers(self) -> dict[LayerCall, SampledCosts]:
        """`SampledCosts` of every layer and input size, in nanoseconds, as they were measured."""
        return {call: _costs(found) for call, found in self.timings.items()}

    def noise_of(self, call: LayerCall) -> float:
        """By how many nanoseconds a layer's times differ when they are measured again: a median."""
        known = [t.noise for t in self.timings[call].values() if t.spread is not None]
        return statistics.median(known) if known else 0.0

    @property
    def noise(self) -> float:
        """By which fraction times differ when they are measured again, for all layers together.

        It is 0.01 to 0.03 on a quiet machine, and 0.1 and more on a busy one. It is 0 if everything
        was measured only once.
        """
        counts = self.calls.items()
        dense = sum(count * self.layers[call].dense for call, count in counts)
        return sum(count * self.noise_of(call) for call, count in counts) / max(dense, 1)

    def costs(self, calls: Iterable[LayerCall]) -> SampledCosts:
        """The costs of a layer's choices in all its calls, without the noise."""
        counts = collections.Counter(calls)
        parts = [(count, self.layers[call]) for call, count in counts.items()]
        noise = sum(count * self.noise_of(call) for call, count in counts.items())
        return sum_costs(parts).smoothed(round(noise))

    def warn_of_noise(self, *, stacklevel: int) -> None:
        """Warns if the table is too noisy to choose by.

        Args:
            stacklevel: The frame that the warning names; 1 is the caller of this function.
        """
        if self.noise > MOST_NOISE:
            warnings.warn(
                f"Latency was measured on a busy machine: measured again, times differ by "
                f"{self.noise:.0%}. Plans made of this table may be slower than they say. Measure "
                "again when nothing else runs.",
                stacklevel=stacklevel + 1,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to `path` as CSV; docs/how-to/latency.md describes its columns."""
        settings = Settings(self.quantize, self.threads, self.target)
        rows = [settings.row(None, **dataclasses.asdict(self.model))]
        for call, found in self.timings.items():
            for point, timing in found.items():
                rows.append(
                    settings.row(call, self.calls[call], point, **dataclasses.asdict(timing))
                )
        write_csv(path, rows)

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
        models: list[Timing] = []
        calls: dict[LayerCall, int] = {}
        timings: dict[LayerCall, dict[Point, Timing]] = {}
        try:
            settings = {(row["quantize"], int(row["threads"]), row["target"]) for row in rows}
            for row in rows:
                timing = _timing(row)
                if row["kind"] == "model":
                    if timing.nanoseconds < 1:
                        raise ValueError(f"{timing.nanoseconds} ns for the whole model")
                    models.append(timing)
                    continue
                call = LayerCall.from_row({key: str(value) for key, value in row.items()})
                calls[call] = int(row["calls"])
                point = int(row["slices"]), int(row["rank"]), int(row["scheme"])
                timings.setdefault(call, {})[point] = timing
            for found in timings.values():
                _costs(found)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(
                f"Expected a latency table in {where!r}: numbers in the columns of sizes and "
                f"times, and a dense row for every layer. Received: one that does not fit ({error})"
            ) from error
        if len(settings) != 1 or len(models) != 1:
            raise ValueError(
                f"Expected the latency table in {where!r} to hold one model, measured with one "
                "quantization, number of threads and target. "
                f"Received: {len(models)} models, settings {sorted(map(str, settings))}"
            )
        ((quantize, threads, target),) = settings
        number_format = None if quantize == "float32" else quantize
        return cls(models[0], timings, calls, number_format, threads, target)


def _costs(timings: Mapping[Point, Timing]) -> SampledCosts:
    return SampledCosts.of_points({point: t.nanoseconds for point, t in timings.items()})


def _timing(row: Mapping[str, Any]) -> Timing:
    """The time in a row of a CSV file."""
    spread = float(row["spread"]) if row["spread"] else None
    if spread is not None and not spread >= 0:
        raise ValueError(f"spread={spread}")
    return Timing(round(float(row["nanoseconds"])), int(row["repeats"]), spread)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Reads the rows of a CSV file; returns none if the file is not text."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error):
            return []
