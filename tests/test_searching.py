"""`search`: the smallest model within the limit, the file to resume from, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import keras
import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds import CalibrationStats, SearchPoint, SearchResult
from keras_alds.resources import Cost
from keras_alds.searching import TOLERANCE, Tried, _alike, next_cr

X = np.random.default_rng(0).standard_normal((64, 16)).astype("float32")


@pytest.fixture
def net(keras_module):
    """Kernels whose singular values fall steadily, so that outputs change steadily."""
    K = keras_module
    random = np.random.default_rng(0)
    inputs = K.Input((16,))
    x = K.layers.Dense(32, "relu", name="first")(inputs)
    x = K.layers.Dense(32, "relu", name="second")(x)
    model = K.Model(inputs, K.layers.Dense(10, name="head")(x), name="net")
    for layer in model.layers[1:]:
        rows, columns = layer.kernel.shape
        u, _, v = np.linalg.svd(random.standard_normal((rows, columns)), full_matrices=False)
        layer.kernel.assign(3 * (u * 0.8 ** np.arange(len(v))) @ v)
    return model


class Closeness:
    """How near outputs are to those of the first model that it sees; counts its calls."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at, self.wanted = 0, fail_at, None

    def __call__(self, model) -> float:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        found = np.asarray(model(X[:32], training=False))
        if self.wanted is None:
            self.wanted = found
        return 1 - float(np.abs(found - self.wanted).mean() / np.abs(self.wanted).mean())


# -- Which ratio is next ---------------------------------------------------------------------------


def follow(curve, max_drop, *, greatest=0.97, most=8):
    """The best ratio that is found on a curve, and the number of evaluations."""
    tried: list[Tried] = []
    while len(tried) < most:
        cr = next_cr(tried, curve(0.0), max_drop, greatest, most - len(tried))
        if cr is None:
            break
        assert 0 < cr < greatest
        tried.append(Tried(cr, cr, curve(cr)))
    limit = curve(0.0) - max_drop
    return max((t.removed for t in tried if t.score >= limit), default=0.0), len(tried)


@pytest.mark.parametrize("where", [0.03, 0.2, 0.37, 0.5, 0.61, 0.88, 0.955])
@pytest.mark.parametrize(
    "shape",
    [
        lambda t: t,
        lambda t: t**6,
        lambda t: math.expm1(20 * t) / math.expm1(20),
        lambda t: min(math.expm1(60 * min(t, 1.1)) / math.expm1(60), 80),  # down to chance
        lambda t: float(t > 1) * 50,  # a step
        lambda t: -5 * t * (t < 1) + 2 * (t > 1),  # gains at first
    ],
    ids=["linear", "power", "exponential", "chance", "step", "gain"],
)
def test_the_ratio_is_found_to_the_tolerance(shape, where):
    best, evaluations = follow(lambda cr: 0.9 - 0.01 * shape(cr / where), 0.01)
    assert where - TOLERANCE - 1e-3 <= best <= where + 1e-9
    assert evaluations <= 8


def test_interpolation_takes_fewer_evaluations_than_halving():
    counts = [
        follow(lambda cr, w=w: 0.9 - 0.01 * math.expm1(15 * cr) / math.expm1(15 * w), 0.01)[1]
        for w in np.linspace(0.1, 0.9, 17)
    ]
    assert np.mean(counts) < 5.5  # halving takes 7


@pytest.mark.parametrize("max_drop", [0.0, 0.01])
def test_no_loss_and_no_gain(max_drop):
    best, _ = follow(lambda cr: 0.9, max_drop)
    assert best > 0.97 - TOLERANCE - 1e-3
    best, evaluations = follow(lambda cr: 0.9 if cr == 0 else -math.inf, max_drop)
    assert (best, evaluations) == (0.0, 7)
    best, _ = follow(lambda cr: 0.9 if cr == 0 else math.nan, max_drop)
    assert best == 0.0


def test_what_is_open_is_halved_where_ratios_give_the_same_plan():
    tried = [Tried(0.16, 0.26, 0.892)]
    assert next_cr(tried, 1.0, 0.1, 0.5, 7) == 0.15  # interpolated
    assert next_cr([*tried, Tried(0.15, 0.26, 0.892)], 1.0, 0.1, 0.5, 7) == 0.075


def test_little_that_can_be_removed_is_tried_once():
    assert follow(lambda cr: 0.9, 0.01, greatest=0.006) == (0.003, 1)


# -- The search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_it_finds_what_a_scan_of_all_ratios_finds(net):
    options = {"calibration_data": CalibrationStats.collect(net, X, verbose=0)}
    options |= {"method": "activation", "objective": "macs", "target": "size"}
    evaluate = Closeness()
    evaluate(net)
    scan = {
        cr: evaluate(keras_alds.compress(net, cr, **options))
        for cr in np.arange(0.02, 0.6, 0.02).round(2).tolist()
    }
    before = net.get_weights()
    for max_drop in (0.02, 0.2):
        evaluate.calls = 0
        result = keras_alds.search(net, evaluate, max_drop=max_drop, verbose=0, **options)
        assert evaluate.calls == 1 + len(result.points) <= 9
        best = result.best
        assert best.score >= result.limit == 1 - max_drop
        # Scores do not fall quite steadily: between these two it depends on what was tried.
        first_beyond = min(cr for cr, score in scan.items() if score < result.limit)
        last_within = max(cr for cr, score in scan.items() if score >= result.limit)
        assert first_beyond - 0.02 - TOLERANCE <= best.removed <= last_within + 0.02 + TOLERANCE
        assert last_within - first_beyond < 0.06
        assert best.removed == max(p.removed for p in result.points if p.score >= result.limit)
        assert evaluate(result.model) == best.score
        assert best.cost == Cost(keras_alds.count_macs(net), keras_alds.count_macs(result.model))
    for old, new in zip(before, net.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_model_is_that_of_compress_and_data_are_used_once(net, monkeypatch):
    """Both Kerases, and data that can be read once only."""
    collected = []
    observed = CalibrationStats._observed

    def spy(*args, **kwargs):
        collected.append(1)
        return observed(*args, **kwargs)

    monkeypatch.setattr(CalibrationStats, "_observed", spy)
    net.compile("sgd", "mse")
    data = (batch for batch in np.split(X, 2))
    result = keras_alds.search(
        net, Closeness(), max_drop=0.2, max_evaluations=2, calibration_data=data, verbose=0
    )
    assert len(collected) == 1
    assert type(result.model) is type(net)
    assert result.model.optimizer is not net.optimizer
    monkeypatch.undo()
    small = keras_alds.compress(net, result.best.cr, calibration_data=X)
    np.testing.assert_allclose(
        zoo.outputs(result.model, X), zoo.outputs(small, X), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_refine_brings_smaller_models_within_the_limit(net):
    plain, refined = (
        keras_alds.search(
            net, Closeness(), max_drop=0.3, max_evaluations=2, calibration_data=X,
            sequential=False, refine=refine, target="size", verbose=0,
        )
        for refine in (False, 40)
    )  # fmt: skip
    assert plain.points[0].cr == refined.points[0].cr
    assert refined.points[0].score > plain.points[0].score


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_equal_plans_are_evaluated_once(net):
    evaluate = Closeness()
    result = keras_alds.search(
        net, evaluate, max_drop=0.3, method="energy", max_slices=1, rank_multiple=8, verbose=0
    )
    plans = [point.plan.choices for point in result.points]
    assert len(set(plans)) == len(plans) == evaluate.calls - 1
    # The ratio just above what was removed fails, or cannot be reached.
    try:
        small = keras_alds.compress(
            net, result.best.removed + TOLERANCE, method="energy", max_slices=1, rank_multiple=8
        )
    except ValueError:
        return
    assert evaluate(small) < result.limit


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_plans_that_correct_moving_statistics_are_others(net):
    plan = keras_alds.select(net, 0.3, method="energy")
    assert _alike(plan, dataclasses.replace(plan, distance=0.1))
    assert not _alike(plan, dataclasses.replace(plan, normalized=True))


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_what_matches_no_layer_is_said_once(net):
    with pytest.warns(UserWarning, match="matches no layer") as found:
        keras_alds.search(
            net, Closeness(), max_drop=0.5, max_evaluations=3, method="energy", verbose=0,
            exclude="stem", bounds={"tail": (None, 0.5)},
        )  # fmt: skip
    texts = [str(warning.message) for warning in found]
    assert [text.split(" matches no layer")[0] for text in texts] == [
        "`exclude` entry 'stem'",
        "`bounds` entry 'tail'",
    ]
    assert {warning.filename for warning in found} == {__file__}


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_no_model_within_the_limit_gives_the_model_itself(net):
    with pytest.warns(UserWarning, match=r"No compressed model met the limit: \d models scored"):
        result = keras_alds.search(
            net, lambda model: float(model is net), max_drop=0.5, method="energy", verbose=0
        )
    assert result.model is net
    assert result.best is result.plan is None
    lines: list[str] = []
    result.summary(print_fn=lines.append)
    for text in (repr(result), lines[0]):
        assert "compressed models met the limit: the result is the model as it was given" in text


# -- The file --------------------------------------------------------------------------------------


OPTIONS = {
    "target": "size",
    "max_drop": 0.1,
    "max_evaluations": 5,
    "calibration_data": X,
    "verbose": 0,
}


def stats_of(model, x):
    return CalibrationStats.collect(model, x, verbose=0)


class TestResume:
    @pytest.fixture
    def keras_module(self):
        return keras

    def test_goes_on_after_an_error(self, net, tmp_path):
        path = tmp_path / "search.json"
        whole = keras_alds.search(net, Closeness(), **OPTIONS)
        first = Closeness(fail_at=4)  # the third compressed model
        with pytest.raises(KeyboardInterrupt):
            keras_alds.search(net, first, resume=path, **OPTIONS)
        assert len(json.loads(path.read_text(encoding="utf-8"))["points"]) == 2
        first.fail_at = None
        result = keras_alds.search(net, first, resume=path, **OPTIONS)
        assert first.calls == 1 + len(whole.points) + 1
        assert [point.score for point in result.points] == [point.score for point in whole.points]
        assert result.plan == whole.plan
        assert [file.name for file in tmp_path.iterdir()] == ["search.json"]
        # Once more: nothing is left to evaluate, and the model is made again.
        again = keras_alds.search(net, first, resume=path, **OPTIONS)
        assert first.calls == 1 + len(whole.points) + 1
        np.testing.assert_array_equal(zoo.outputs(again.model, X), zoo.outputs(whole.model, X))
        # In another order, the examples are the same.
        options = {**OPTIONS, "calibration_data": X[::-1], "max_evaluations": len(whole.points)}
        keras_alds.search(net, first, resume=path, **options)
        assert first.calls == 1 + len(whole.points) + 1
        # With another limit, the scores in the file count.
        options = {**OPTIONS, "max_drop": 0.5, "max_evaluations": 8}
        wider = keras_alds.search(net, first, resume=path, **options)
        assert wider.points[: len(whole.points)] == result.points
        assert wider.best.removed > result.best.removed

    def test_plans_that_came_up_twice_are_not_evaluated_again(self, net, tmp_path):
        path = tmp_path / "search.json"
        # With so few ranks, several ratios give the same plan.
        options = {"max_drop": 0.05, "rank_multiple": 8, "max_slices": 1, "method": "energy"}
        options |= {"resume": path, "verbose": 0}
        evaluate = Closeness()
        first = keras_alds.search(net, evaluate, **options)
        assert json.loads(path.read_text(encoding="utf-8"))["same"]
        assert evaluate.calls == 1 + len(first.points)
        again = keras_alds.search(net, evaluate, **options)
        assert (again.points, again.plan) == (first.points, first.plan)
        assert evaluate.calls == 1 + len(first.points)

    def test_refuses_other_searches(self, net, tmp_path, monkeypatch):
        collected = []
        monkeypatch.setattr(CalibrationStats, "_observed", lambda *_, **__: collected.append(1))
        path = tmp_path / "search.json"
        options = {"max_drop": 0.5, "max_evaluations": 1, "resume": path, "verbose": 0}
        keras_alds.search(net, Closeness(), method="energy", **options)
        before = path.read_bytes()
        for other, names in (
            ({"method": "alds"}, "method"),
            ({"method": "energy", "objective": "macs"}, "objective"),
            ({"method": "energy", "exclude": "head"}, "exclude"),
            ({"calibration_data": X, "method": "activation", "schemes": 0}, "calibration_data"),
        ):
            with pytest.raises(ValueError, match=f"a search with other .*{names}"):
                keras_alds.search(net, Closeness(), **other, **options)
            assert not collected
        monkeypatch.undo()
        for name, data in (("x", (X, -X)), ("stats", (stats_of(net, X), stats_of(net, 2 * X)))):
            options |= {"resume": tmp_path / name}
            keras_alds.search(net, Closeness(), calibration_data=data[0], **options)
            with pytest.raises(ValueError, match="a search with other calibration_data"):
                keras_alds.search(net, Closeness(), calibration_data=data[1], **options)
        options |= {"resume": path}
        net.layers[1].kernel.assign(2 * net.layers[1].kernel)
        with pytest.raises(ValueError, match="a search with other weights"):
            keras_alds.search(net, Closeness(), method="energy", **options)
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[1]",
            '{"format": "other", "version": 1}',
            '{"format": "keras_alds.search", "version": 1, "search": 1, "dense_score": 1}',
        ],
    )
    def test_refuses_other_files(self, net, tmp_path, text):
        path = tmp_path / "other.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"Expected the scores of a search in .*other\.json"):
            keras_alds.search(net, Closeness(), method="energy", resume=path, verbose=0)
        assert path.read_text(encoding="utf-8") == text

    def test_a_wrong_folder_fails_before_the_first_evaluation(self, net, tmp_path):
        evaluate = Closeness()
        with pytest.raises(FileNotFoundError):
            keras_alds.search(net, evaluate, method="energy", resume=tmp_path / "no" / "a.json")
        assert not evaluate.calls


# -- Arguments and figures -------------------------------------------------------------------------


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_what_is_refused(net):
    def zero(model):
        return 0.0

    cases = [
        ((X,), {}, ValueError, "Expected `evaluate` to be a function of a model"),
        ((lambda model: [1, 2],), {}, ValueError, r"one number.* Received: \[1, 2\]"),
        ((lambda model: math.nan,), {}, ValueError, "Expected a finite score of the model 'net'"),
        ((zero,), {"max_drop": -0.1}, ValueError, "`max_drop`.* Received: max_drop=-0.1"),
        ((zero,), {"max_drop": "1%"}, ValueError, "Received: max_drop='1%'"),
        ((zero,), {"max_evaluations": 0}, ValueError, "Received: max_evaluations=0"),
        ((zero,), {"objective": "size"}, ValueError, "Received: objective='size'"),
        ((zero,), {"refine": True}, ValueError, "Expected examples as `calibration_data`"),
        ((zero,), {"cr": 0.5}, TypeError, r"search\(\) got an unexpected keyword argument 'cr'"),
        ((zero,), {"exclude": [".*"]}, ValueError, "to hold a layer that can be factorized"),
    ]
    for args, options, kind, text in cases:
        with pytest.raises(kind, match=text):
            keras_alds.search(net, *args, **{"method": "energy", "verbose": 0, **options})
    with pytest.raises(ValueError, match="Expected `model` to be a built"):
        keras_alds.search("net.keras", zero)
    small = keras_alds.compress(net, 0.3, method="energy")
    with pytest.raises(ValueError, match="Expected a model that is not compressed yet"):
        keras_alds.search(small, zero, method="energy")


@pytest.mark.parametrize("keras_module", [keras], ids=["keras"])
def test_table_frontier_and_plot(net):
    plan = keras_alds.select(net, 0.3, method="energy")

    def point(cr, after, score):
        costs = {"params": Cost(1000, after)}
        return SearchPoint(
            dataclasses.replace(plan, requested={"params": cr}, costs=costs), score, 1
        )

    points = (point(0.5, 500, 0.7), point(0.3, 690, 0.86), point(0.25, 740, 0.85))
    result = SearchResult("net", "params", 0.05, 0.9, points, net)
    assert result.best is points[1]
    assert [p.removed for p in result.frontier] == pytest.approx([0.31, 0.5])
    lines: list[str] = []
    result.summary(print_fn=lines.append)
    table = [line for line in lines[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[2] == ["dense", "–", "–", "0.9000", "–", "–"]
    assert rows[3] == ["cr=0.25", "1,000 → 740", "26.00%", "0.8500", "yes", "1.0"]
    assert [row[4] for row in rows[4:]] == ["taken", "no"]
    assert "31.00% of the parameters removed, score 0.9000 → 0.8600" in repr(result)
    pytest.importorskip("matplotlib")
    axes = result.plot()
    best, models, limit, taken = axes.lines
    assert best.get_xdata().tolist() == pytest.approx([0.5, 0.69, 1.0])
    assert models.get_xdata().tolist() == pytest.approx([0.5, 0.69, 0.74, 1.0])
    assert limit.get_ydata() == pytest.approx([0.85, 0.85])
    assert (taken.get_xdata()[0], taken.get_ydata()[0]) == pytest.approx((0.69, 0.86))
    assert result.plot(axes) is axes
