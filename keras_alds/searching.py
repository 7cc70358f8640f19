"""`search` finds the smallest model whose score falls by at most a given amount."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from keras_alds import plots
from keras_alds._backend import tensors
from keras_alds._backend.layers import KerasModel
from keras_alds.api import carried_out
from keras_alds.choosing import (
    Chosen,
    calibrated,
    checked_options,
    choose,
    make_choice,
    selection_of,
    wants_data,
)
from keras_alds.core.checks import positive_int
from keras_alds.models.calibration import Calibration, fingerprint
from keras_alds.models.data import KeptExamples
from keras_alds.models.fit import check_sequential
from keras_alds.models.inventory import Inventory, check_is_model
from keras_alds.models.recompose import inspected
from keras_alds.models.selection import Selection
from keras_alds.models.turns import alone
from keras_alds.options import LEAST_CR, Options, SelectOptions, takes_options
from keras_alds.plan import CompressionPlan
from keras_alds.progress import progress_bar
from keras_alds.refinement import refined, steps_of
from keras_alds.resources import RESOURCES, Cost
from keras_alds.scores import Scored, check_evaluate, frontier, scored
from keras_alds.tables import Tabular, TextTable, counted
from keras_alds.writing import write_whole

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: The search ends when the largest ratio that meets the limit is known to so much.
TOLERANCE = 0.01
# Between ratios, the logarithm of the loss of score is interpolated. Losses below this part of the
# allowed one are noise.
_NOISE = 1 / 8
# Where evaluations are too few for the tolerance, no side is larger than this part.
_LARGER_PART = 0.75
_FORMAT, _VERSION = "keras_alds.search", 1


@dataclasses.dataclass(frozen=True, repr=False)
class SearchPoint:
    """One compressed model that `search` has evaluated.

    Attributes:
        plan: Its plan.
        score: The result of `evaluate`.
        seconds: The time to choose, compress, refine and evaluate it.
    """

    plan: CompressionPlan
    score: float
    seconds: float

    def __repr__(self) -> str:
        return f"<SearchPoint cr={self.cr:g}: removed={self.removed:.4f}, score={self.score:g}>"

    @property
    def cr(self) -> float:
        """The requested fraction to remove of what the objective counts."""
        return self.plan.requested_cr

    @property
    def removed(self) -> float:
        """The fraction that was removed; at least `cr`."""
        return self.plan.cr

    @property
    def cost(self) -> Cost:
        """What the objective counts, as `Cost(before, after)`."""
        return self.plan.costs[self.plan.objective]


@dataclasses.dataclass(frozen=True, repr=False)
class SearchResult(Tabular):
    """The result of `search`.

    Attributes:
        name: The model's name.
        objective: What the ratios count: `"params"`, `"macs"` or `"latency"`.
        max_drop: By how much the score was allowed to fall.
        dense_score: The score of the model itself.
        points: A `SearchPoint` for every compressed model that was evaluated, in that order.
        model: The smallest compressed model within the limit, or the model that was given if there
            is none.

    Example:
    ```python
    accuracy = lambda model: float((model.predict(x, verbose=0).argmax(-1) == y).mean())
    result = keras_alds.search(model, accuracy, max_drop=0.1, max_evaluations=2, verbose=0)
    result.summary()
    result.model.save("small.keras")
    ```
    """

    name: str
    objective: str
    max_drop: float
    dense_score: float
    points: tuple[SearchPoint, ...]
    model: Any

    def __repr__(self) -> str:
        return f"<SearchResult for {self.name!r}: {self._statement()}. summary() shows all>"

    @property
    def limit(self) -> float:
        """The least score that is allowed."""
        return self.dense_score - self.max_drop

    @property
    def best(self) -> SearchPoint | None:
        """The point of the smallest model within the limit, or None if there is none."""
        return _best(self.points, self.limit)

    @property
    def plan(self) -> CompressionPlan | None:
        """Its plan, or None."""
        return None if self.best is None else self.best.plan

    @property
    def frontier(self) -> tuple[SearchPoint, ...]:
        """The points than which no other one is better in size and score, largest model first."""
        points = {Scored(1 - point.removed, point.score): point for point in self.points}
        return tuple(points[key] for key in reversed(frontier(points)))

    def to_rows(self) -> list[dict[str, Any]]:
        """The model itself and all that were evaluated, in that order, as dicts."""
        dense = {"cr": 0.0, "removed": 0.0, "score": self.dense_score, "within_limit": True}
        rows = [{**dense, "taken": self.best is None, "seconds": None}]
        for point in self.points:
            figures = {"cr": point.cr, "removed": point.removed, "score": point.score}
            within = point.score >= self.limit
            taken = point is self.best
            rows.append(
                {**figures, "within_limit": within, "taken": taken, "seconds": point.seconds}
            )
        return rows

    def _table(self) -> TextTable:
        """All models that were evaluated, smallest last."""
        info, best = RESOURCES[self.objective], self.best
        rows = [["dense", "–", "–", f"{self.dense_score:.4f}", "–", "–"]]
        for point in sorted(self.points, key=lambda p: p.removed):
            within = "taken" if point is best else "yes" if point.score >= self.limit else "no"
            rows.append(
                [
                    f"cr={point.cr:g}",
                    info.text(point.cost),
                    f"{point.removed:.2%}",
                    f"{point.score:.4f}",
                    within,
                    f"{point.seconds:.1f}",
                ]
            )
        columns = ["Model", info.column, "Removed", "Score", "Within limit", "Seconds"]
        title = f"Search for {self.name!r}: max_drop={self.max_drop:g}, score >= {self.limit:.4f}"
        return TextTable(title, columns, rows, [self._statement()])

    def plot(self, ax: Any = None) -> Any:
        """Plots the scores against the size that is left; see `keras_alds.plots.scores`.

        Args:
            ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

        Returns:
            The axes. `axes.figure.savefig("search.png")` writes a file.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plots.scores(self, ax=ax)

    def _statement(self) -> str:
        """What was found, in one sentence."""
        models = counted(len(self.points), "compressed model")
        if self.best is None:
            return (
                f"None of {models} met the limit: the result is the model as it was given, with "
                f"score {self.dense_score:.4f}"
            )
        return (
            f"{self.best.removed:.2%} of {RESOURCES[self.objective].counted} removed, score "
            f"{self.dense_score:.4f} → {self.best.score:.4f}, {models} evaluated"
        )


@takes_options()
def search(
    model: KerasModel,
    evaluate: Callable[[Any], float],
    *,
    max_drop: float = 0.01,
    max_evaluations: int = 8,
    calibration_data: Any = None,
    sequential: bool | None = None,
    refine: bool | int = False,
    resume: str | os.PathLike[str] | None = None,
    verbose: int = 1,
    **options: Unpack[SelectOptions],
) -> SearchResult:
    """Finds the smallest model whose score falls by at most `max_drop`.

    `model` is not changed. It is evaluated first, and then one compressed model after the other.
    The next `cr` is interpolated from the scores so far, or is the midpoint of the remaining
    interval if two ratios gave the same plan. Each is chosen so that bisection could still reach a
    precision of 0.01 with the evaluations that are left. The search ends when the largest `cr`
    within the limit is known to 0.01, usually after five compressed models. Statistics of the
    calibration data are collected once.

    Scores are noisy, and need not fall steadily as more is removed. The result is always a model
    that was evaluated and met the limit. As in `select`, it has only forms that run fast on common
    CPUs, unless you pass a `target` or `max_slices`. A smaller one that meets it too may exist. If
    none met it, the result is `model` itself, and a warning says so.

    To search by the score of int8 files, let `evaluate` convert the models and score the files
    (docs/how-to/choose-cr.md).

    Args:
        model: A built Keras 3 or tf_keras model, not compressed yet.
        evaluate: `evaluate(model)` returns the score of a model, such as its accuracy; higher is
            better. Use examples that are in neither the training nor the calibration data, and
            enough of them: on 1,000 images, an accuracy of 0.9 is known to about 0.01.
        max_drop: Float >= 0, in the unit of the score. By how much the score may fall below that of
            `model`. Defaults to 0.01.
        max_evaluations: Integer >= 1. The most compressed models to evaluate. Defaults to 8, which
            always suffices for the tolerance of 0.01.
        calibration_data: As for `select`. Defaults to None.
        sequential: As for `compress`. Defaults to None.
        refine: As for `compress`, after each compression. Defaults to False.
        resume: Path of a JSON file, or None. The scores are written to it after every evaluation.
            If it exists already, the search goes on where it was, also with another `max_drop` or
            more `max_evaluations`; the scores in it count. `evaluate` has to be the same function,
            and the calibration data the same examples. With `objective="latency"`, pass
            `latency_table` too: latencies that are measured anew differ a little. Defaults to None.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.
        {options}

    Returns:
        A `SearchResult`: the model, its plan, and the scores of all that was evaluated.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: As for `select`; if `evaluate` is not a function or returns no number, an
            argument is not as above, the model is compressed already, or the file `resume` is of
            another search. What `evaluate` raises is passed on.

    Example:
    ```python
    def accuracy(model):
        return float((model.predict(x, verbose=0).argmax(-1) == y).mean())


    result = keras_alds.search(
        model, accuracy, max_drop=0.1, max_evaluations=2, calibration_data=x, verbose=0
    )
    print(result)
    small = result.model
    ```

    References:
        The loss of accuracy as the only input is that of NNCF's accuracy-aware training (Kozlov et
        al., 2020, arXiv:2002.08679) and AIMET's selection of ranks. The next ratio is interpolated,
        limited and projected as in the ITP method (Oliveira and Takahashi, ACM TOMS 47, 2021).
    """
    check_evaluate(evaluate)
    _check_max_drop(max_drop)
    most = positive_int(max_evaluations, "max_evaluations")
    has_data = calibration_data is not None
    checked = checked_options(LEAST_CR, options, has_data=has_data, caller="search")
    check_sequential(sequential, calibration_data, checked.method)
    steps = steps_of(refine, calibration_data)
    check_is_model(model)
    makes = _Maker.of(
        model, checked, calibration_data, sequential, steps, verbose=verbose, stacklevel=2
    )
    record = _Record.at(resume, makes.described())
    greatest = makes.collected(verbose, stacklevel=2)
    with progress_bar(verbose) as progress:
        task = progress.add_task("dense", total=1 + most, completed=len(record.points))
        dense_score = record.dense_score
        if dense_score is None:
            dense_score = record.note_dense(_dense_score(evaluate, model))
        progress.advance(task)
        small = None
        limit = dense_score - max_drop
        for cr, chosen, start in _asked(record, makes, most, (dense_score, max_drop, greatest)):
            progress.update(task, description=f"cr={cr:g}")
            candidate = makes.made(chosen)
            score = scored(evaluate, candidate)
            point = SearchPoint(chosen.plan, score, time.perf_counter() - start)
            record.add(point)
            if _best(record.points, limit) is point:
                small = candidate
            progress.advance(task)
    best = _best(record.points, limit)
    if best is None:
        small = model
        _warn_of_none(record, limit, stacklevel=2)
    elif small is None:
        small = makes.made_again(best.plan)
    return SearchResult(
        model.name,
        checked.objective,
        float(max_drop),
        dense_score,
        tuple(record.points),
        small,
    )


# -- Which ratio is next ---------------------------------------------------------------------------


class Tried(NamedTuple):
    """A ratio that was requested, the fraction that was removed for it, and the score."""

    cr: float
    removed: float
    score: float


def next_cr(
    tried: Sequence[Tried], dense_score: float, max_drop: float, greatest: float, left: int
) -> float | None:
    """The next ratio to try, or None if the largest one within the limit is known.

    Args:
        tried: What was tried so far.
        dense_score: The score of the model itself.
        max_drop: By how much the score may fall.
        greatest: The largest ratio that can be reached.
        left: Number of evaluations that are left, with this one.

    Example:
        >>> next_cr([], 0.9, 0.01, 0.98, 8)
        0.49
        >>> next_cr([Tried(0.49, 0.49, 0.6)], 0.9, 0.01, 0.98, 7)  # lost far too much
        0.1859
    """
    limit = dense_score - max_drop
    within = [t for t in tried if t.score >= limit]
    low = max(within, key=lambda t: t.removed, default=Tried(0.0, 0.0, dense_score))
    # A score below the limit at a smaller ratio than that is noise.
    beyond = [t for t in tried if not t.score >= limit and t.cr > low.removed]
    high = min(beyond, key=lambda t: t.cr, default=Tried(greatest, greatest, -math.inf))
    start, end = low.removed, high.cr
    width = end - start
    if width <= TOLERANCE and tried:
        return None
    cr = start + width / 2
    # Where a larger ratio gave the same plan, the score says nothing about the ratios below.
    repeated = any(t.removed == high.removed and t.cr > high.cr for t in tried)
    if width > 2 * TOLERANCE and max_drop > 0 and math.isfinite(high.score) and not repeated:
        below, above = (
            math.log(max((dense_score - t.score) / max_drop, _NOISE)) for t in (low, high)
        )
        cr = start + width * below / (below - above)
        # Of what is open, each side has to be small enough for the evaluations that are left. A
        # ratio at an end of it would tell nothing.
        allowed = TOLERANCE * 2.0 ** (left - 1)
        # Ratios are rounded, so a little more than the double is fine.
        widest = max(allowed, width / 2) if width < 2.1 * allowed else _LARGER_PART * width
        cr = max(cr, end - widest, start + TOLERANCE)
        cr = min(cr, start + widest, end - TOLERANCE)
    return round(cr, 4)


def _asked(
    record: _Record, makes: _Maker, most: int, limits: tuple[float, float, float]
) -> Iterator[tuple[float, Chosen, float]]:
    """The ratios to evaluate one after the other, what is chosen for them, and when it began.

    A plan that was evaluated already, for another ratio, is not evaluated again.

    Args:
        record: What was measured so far; whoever evaluates adds to it.
        makes: Chooses for a ratio.
        most: The most points.
        limits: Score of the model itself, by how much it may fall, and the largest ratio.
    """
    while len(record.points) < most:
        tried = [*(Tried(p.cr, p.removed, p.score) for p in record.points), *record.same]
        left = most - len(record.points)
        cr = next_cr(tried, *limits, left)
        if cr is None:
            return
        start = time.perf_counter()
        chosen = makes.chosen(cr)
        known = next((p for p in record.points if _alike(p.plan, chosen.plan)), None)
        if known is None:
            yield cr, chosen, start
        else:
            record.same.append(Tried(cr, known.removed, known.score))


def _alike(first: CompressionPlan, second: CompressionPlan) -> bool:
    """Whether two plans make the same model."""

    def parts(plan: CompressionPlan) -> tuple[Any, ...]:
        return plan.choices, plan.method, plan.sequential, plan.normalized

    return parts(first) == parts(second)


def _best(points: Sequence[SearchPoint], limit: float) -> SearchPoint | None:
    """The point within the limit of which most was removed."""
    within = [point for point in points if point.score >= limit]
    return max(within, key=lambda point: point.removed, default=None)


# -- The models ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Chooses for ratios, and makes the models; statistics of the data are collected once.

    It shows no progress bars, as there is one of the whole search.
    """

    inventory: Inventory
    selection: Selection
    options: Options
    calibration: Calibration | None
    sequential: bool | None
    steps: int | None  # of a refinement

    @classmethod
    def of(
        cls,
        model: Any,
        options: Options,
        data: Any,
        sequential: bool | None,
        steps: int | None,
        *,
        verbose: int,
        stacklevel: int,
    ) -> _Maker:
        """Looks at a model and the data; statistics are not collected yet."""
        with alone(model):
            inventory = inspected(model, options)
            selection = selection_of(inventory, options, verbose=verbose, stacklevel=stacklevel + 1)
            calibration = None
            if data is not None:
                calibration = Calibration.of(selection.inventory, data, stacklevel=stacklevel + 1)
        # Users were warned of what matches no layer; once is enough.
        inventory = dataclasses.replace(inventory, unmatched=())
        options = dataclasses.replace(options, bounds=selection.matched_bounds)
        return cls(inventory, selection, options, calibration, sequential, steps)

    def collected(self, verbose: int, *, stacklevel: int) -> float:
        """Collects the statistics, and returns the largest ratio that can be reached."""
        with alone(self.inventory.model):
            selection, _ = calibrated(
                self.selection, self.calibration, verbose=verbose, stacklevel=stacklevel + 1
            )
            return selection.greatest(selection.resources[0])

    def described(self) -> dict[str, str]:
        """What the scores of a search depend on, besides `evaluate`."""
        given = {
            field.name: repr(getattr(self.options, field.name))
            for field in dataclasses.fields(self.options)
            if field.name != "limits"
        }
        return {
            "weights": fingerprint(self.inventory.model),
            "calibration_data": _described(self.calibration),
            "sequential": repr(self.sequential),
            "refine": repr(self.steps),
            **given,
        }

    def chosen(self, cr: float) -> Chosen:
        """What is chosen for a ratio."""
        options = dataclasses.replace(self.options, limits={self.options.objective: cr})
        with alone(self.inventory.model):
            return choose(
                self.inventory,
                options,
                self.calibration,
                self.sequential,
                verbose=0,
                stacklevel=4,
            )

    def made(self, chosen: Chosen) -> Any:
        """The compressed and refined model."""
        model = self.inventory.model
        with alone(model):
            small = carried_out(model, chosen, self.sequential, last=False, verbose=0, stacklevel=3)
            examples = None if self.calibration is None else self.calibration.examples
            if self.steps is not None and examples is not None:
                refined(small, model, examples, self.steps, verbose=0)
            return small

    def made_again(self, plan: CompressionPlan) -> Any:
        """The model of a plan that was chosen in an earlier process."""
        data = self.calibration if wants_data(plan) else None
        with alone(self.inventory.model):
            chosen = make_choice(
                self.inventory, plan, data, self.sequential, verbose=0, stacklevel=2
            )
        return self.made(chosen)


def _described(calibration: Calibration | None) -> str:
    """What calibration data are known by; the order of examples does not matter."""
    if calibration is None:
        return "None"
    kept, stats = calibration.examples, calibration.stats
    if kept is not None:
        return f"{kept.total} examples {_digest(kept)}"
    assert stats is not None
    known = (m.ridge / m.relative_ridge for m in stats.moments.values() if m is not None)
    # Sums that are collected again may differ in their last digits.
    return f"{stats.examples} examples, mean eigenvalue {next(known, 0.0):.4g}"


def _digest(examples: KeptExamples) -> str:
    """A hash of all examples."""
    found = []
    for batch, count in examples:
        arrays = [tensors.to_numpy(tensors.dense(x)) for x in tensors.flatten(batch)]
        for row in range(count):
            digest = hashlib.sha256()
            for array in arrays:
                part = array[row : row + 1] if len(array) == count else array
                text = part.dtype.kind == "O"
                digest.update(repr(part.tolist()).encode() if text else part.tobytes())
            found.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()


# -- The file --------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Record:
    """What was measured so far, also in a file if there is one.

    Attributes:
        path: The file, or None.
        search: What the scores depend on, as text by name.
        dense_score: The score of the model itself, or None.
        points: The points.
        same: Ratios for which the plan of a point was chosen again. A search that goes on
            asks for the same ratios only if it knows them.
    """

    path: str | None
    search: dict[str, str]
    dense_score: float | None = None
    points: list[SearchPoint] = dataclasses.field(default_factory=list)
    same: list[Tried] = dataclasses.field(default_factory=list)

    @classmethod
    def at(cls, path: str | os.PathLike[str] | None, search: dict[str, str]) -> _Record:
        """The record in a file, or a new one.

        Raises:
            ValueError: If the file is of another search, or none.
        """
        if path is None:
            return cls(None, search)
        record = cls(os.fspath(path), search)
        if os.path.exists(path):
            record._read(os.fspath(path))
        record._write()  # a wrong path fails before the first evaluation
        return record

    def note_dense(self, score: float) -> float:
        """Takes in the score of the model itself, and returns it."""
        self.dense_score = score
        self._write()
        return score

    def add(self, point: SearchPoint) -> None:
        """Takes in a point."""
        self.points.append(point)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "search": self.search,
            "dense_score": self.dense_score,
            "points": [
                {"score": point.score, "seconds": point.seconds, "plan": point.plan.to_dict()}
                for point in self.points
            ],
            "same": self.same,
        }
        write_whole(self.path, json.dumps(data, indent=1))

    def _read(self, path: str) -> None:
        where = f"Expected the scores of a search in {path!r}. Received: "
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
            if (data["format"], data["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"{data['format']} of version {data['version']}")
            search, self.dense_score = dict(data["search"]), data["dense_score"]
            self.points = [
                SearchPoint(CompressionPlan.from_dict(p["plan"]), p["score"], p["seconds"])
                for p in data["points"]
            ]
            self.same = [Tried(*ratio) for ratio in data.get("same", [])]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}a file without them ({error})") from error
        names = {**search, **self.search}
        if other := [name for name in names if search.get(name) != self.search.get(name)]:
            raise ValueError(
                f"Expected the scores in {path!r} to be of the same model, data and options. "
                f"Received: those of a search with other {', '.join(other)}. Name another file in "
                "`resume`, or delete this one."
            )


# -- Checks ----------------------------------------------------------------------------------------


def _check_max_drop(max_drop: Any) -> None:
    if (
        isinstance(max_drop, bool)
        or not isinstance(max_drop, numbers.Real)
        or not 0 <= float(max_drop) < math.inf
    ):
        raise ValueError(
            "Expected `max_drop`, by how much the score may fall, to be a number >= 0. "
            f"Received: max_drop={max_drop!r}"
        )


def _dense_score(evaluate: Callable[[Any], float], model: Any) -> float:
    score = scored(evaluate, model)
    if not math.isfinite(score):
        raise ValueError(
            f"Expected a finite score of the model '{model.name}' itself. Received: {score}"
        )
    return score


def _warn_of_none(record: _Record, limit: float, *, stacklevel: int) -> None:
    reached = max((point.score for point in record.points), default=None)
    warnings.warn(
        f"No compressed model met the limit: {counted(len(record.points), 'model')} scored at most "
        f"{reached}, and the limit is {limit:.6g}. The result holds the model as it was given. "
        "Allow a larger `max_drop`, pass calibration data or `refine=True`.",
        stacklevel=stacklevel + 1,
    )
