"""`sweep` and its command: the table, the CSV file and the picture."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds import progress
from keras_alds.cli import main
from keras_alds.research.retraining import retrainer


@pytest.fixture
def model(keras_module):
    keras_module.utils.set_random_seed(0)
    return zoo.functional(keras_module)


def accuracy(model):
    x, y = zoo.images(48)
    return float(np.mean(np.asarray(model.predict(x, verbose=0)).argmax(-1) == y))


def distance(model):  # tells small changes of the weights
    x, _ = zoo.images(48)
    return float(np.abs(np.asarray(model.predict(x, verbose=0))).sum())


@pytest.mark.parametrize(
    ("evaluate", "retrain", "text"),
    [
        (zoo.images(8), None, "Expected `evaluate` to be a function of a model.* type tuple"),
        (accuracy, zoo.images(8), "Expected `retrain` to be a function of a model.* type tuple"),
        (lambda model: [1.0, 0.5], None, r"to return one number.* Received: \[1.0, 0.5\]"),
    ],
)
def test_what_the_functions_have_to_be(model, evaluate, retrain, text):
    with pytest.raises(ValueError, match=text):
        keras_alds.sweep(model, evaluate, retrain=retrain, crs=0.3, verbose=0)


def test_rows_are_those_of_compress(model, tmp_path):
    x, _ = zoo.images(32)
    before = model.get_weights()
    result = keras_alds.sweep(
        model, accuracy, methods=["energy", "svd", "pca"], crs=[0.3, 0.99, 0.5],
        calibration_data=x, verbose=0,
    )  # fmt: skip
    assert result.methods == ("energy", "svd", "pca")
    assert result.crs == (0.3, 0.99, 0.5)
    assert result.dense.score == accuracy(model)
    assert (result.dense.params, result.dense.retrained) == (model.count_params(), None)
    for row in result.rows[1:]:
        if row.cr == 0.99:
            assert row.score is row.params is None
            assert "is not reachable" in row.note
            continue
        data = x if row.method == "pca" else None
        options = {"method": row.method, "calibration_data": data, "target": "size"}
        small = keras_alds.compress(model, row.cr, **options)
        assert row.params == small.count_params()
        assert row.removed == 1 - row.params / model.count_params() >= row.cr
        assert row.score == accuracy(small)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)

    assert "3 methods, cr=0.3, 0.99, 0.5 of params, dense score " in repr(result)
    lines = result.to_markdown(digits=3).splitlines()
    assert lines[0] == f"| cr (dense: {result.dense.score:.3f}) | 0.3 | 0.99 | 0.5 |"
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    svd = [row for row in result.rows if row.method == "svd"]
    assert cells == ['`"svd"`', f"{svd[0].score:.3f}", "–", f"{svd[2].score:.3f}"]
    result.to_csv(tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row.method for row in result.rows]
    assert float(rows[1]["score"]) == result.rows[1].score
    assert rows[2]["score"] == ""


def test_activation_is_what_compress_gives(model):
    x, _ = zoo.images(32)
    for sequential in (None, False):
        result = keras_alds.sweep(
            model, distance, methods=["activation", "energy"], crs=[0.5],
            calibration_data=(batch for batch in np.split(x, 4)), sequential=sequential, verbose=0,
        )  # fmt: skip
        options = {"method": "activation", "target": "size"}
        plan = keras_alds.select(model, 0.5, calibration_data=x, **options)
        small = keras_alds.compress(model, plan=plan, calibration_data=x, sequential=sequential)
        assert result.rows[1].score == pytest.approx(distance(small), rel=1e-3)
        assert result.rows[2].score == distance(
            keras_alds.compress(model, 0.5, method="energy", target="size")
        )


@pytest.mark.parametrize("keras_module", zoo.KERASES, ids=lambda module: module.__name__)
def test_retraining_starts_alike_and_leaves_the_model_alone(model, tmp_path):
    x, y = zoo.images(48)
    before = model.get_weights()
    retrain = retrainer(x, y, learning_rates=[0.05, 0.01], epochs=4, batch_size=16)

    def score(candidate):  # tells small changes of the weights
        return float(np.mean(candidate.predict(x, verbose=0)[:, 0]))

    runs = [
        keras_alds.sweep(model, score, methods=["energy"], crs=[0.4], retrain=retrain, verbose=0)
        for _ in range(2)
    ]
    for row in runs[0].rows:
        assert row.retrained != row.score
    assert [row.retrained for row in runs[0].rows] == [row.retrained for row in runs[1].rows]
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    pytest.importorskip("matplotlib")
    runs[0].plot(tmp_path / "sweep.png", label="accuracy")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert f"{runs[0].dense.retrained:.1f}" in runs[0].to_markdown(retrained=True)


@pytest.mark.parametrize("keras_module", zoo.KERASES, ids=lambda module: module.__name__)
def test_learning_rates_are_rewound(model, keras_module, monkeypatch):
    """Every given rate is used for an equal part of the epochs, in order, from a new optimizer."""
    seen = []

    class Spy(keras_module.callbacks.LearningRateScheduler):
        def __init__(self, schedule):
            seen.extend(schedule(epoch) for epoch in range(6))
            super().__init__(schedule)

    monkeypatch.setattr(keras_module.callbacks, "LearningRateScheduler", Spy)
    x, y = zoo.images(16)
    retrainer(x, y, learning_rates=[0.1, 0.01, 0.001], epochs=6, augment=True)(model)
    assert seen == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


@pytest.mark.parametrize("verbose", [0, 1])
def test_at_most_one_progress_bar(model, monkeypatch, verbose):
    live = []

    class Spy(progress.Progress):
        def __enter__(self):
            live.append(not self.disable)
            assert sum(live) <= verbose
            return super().__enter__()

        def __exit__(self, *error):
            live.pop()
            super().__exit__(*error)

    monkeypatch.setattr(progress, "Progress", Spy)
    x, _ = zoo.images(32)
    options = {"methods": ["activation", "svd"], "crs": 0.3, "calibration_data": x}
    keras_alds.sweep(model, lambda _: 0.0, sequential=True, verbose=verbose, **options)


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=r"Expected `calibration_data` for the method 'pca'"):
        keras_alds.sweep(model, accuracy, methods=["pca"])
    with pytest.raises(ValueError, match=r"Received: method='magic'"):
        keras_alds.sweep(model, accuracy, methods=["magic"])
    with pytest.raises(ValueError, match=r"0 < cr < 1"):
        keras_alds.sweep(model, accuracy, crs=[50])
    with pytest.raises(ValueError, match="Expected `objective` to be one of"):
        keras_alds.sweep(model, accuracy, objective="mac")
    for empty in ({"methods": []}, {"crs": []}):
        with pytest.raises(ValueError, match="Expected at least one method and one ratio"):
            keras_alds.sweep(model, accuracy, **empty)
    one = keras_alds.sweep(model, lambda _: 0.0, methods="svd", crs=0.2, verbose=0)
    assert (one.methods, one.crs) == (("svd",), (0.2,))
    without = keras_alds.sweep(model, lambda _: 0.0, crs=[0.2], verbose=0)
    assert "pca" not in without.methods
    assert "svd" in without.methods


def test_without_matplotlib(model, tmp_path, monkeypatch):
    result = keras_alds.sweep(model, lambda _: 0.0, methods=["svd"], crs=[0.2], verbose=0)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "keras_alds\[plots\]"'):
        result.plot(tmp_path / "sweep.png")


class TestCommand:
    @pytest.fixture
    def files(self, model, tmp_path):
        x, y = zoo.images(48)
        model.save(tmp_path / "model.keras")
        np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
        return tmp_path

    def test_writes_what_sweep_gives(self, model, keras_module, files, capsys):
        pytest.importorskip("matplotlib")
        arguments = ["sweep", files / "model.keras", "--keras", keras_module.__name__]
        arguments += ["--data", files / "data.npz", "--methods", "alds", "activation"]
        arguments += ["--crs", 0.3, 0.5, "--calibration", 32, "--csv", files / "sweep.csv"]
        arguments += ["--markdown", files / "sweep.md", "--plot", files / "sweep.png"]
        assert main([str(argument) for argument in arguments]) == 0
        x, y = zoo.images(48)

        def top1(candidate):
            return 100 * float(np.mean(candidate.predict(x[:40], verbose=0).argmax(-1) == y[:40]))

        expected = keras_alds.sweep(
            model, top1, methods=["alds", "activation"], crs=[0.3, 0.5], calibration_data=x[:32],
            verbose=0,
        )  # fmt: skip
        text = (files / "sweep.md").read_text(encoding="utf-8")
        assert expected.to_markdown() in text
        assert text in capsys.readouterr().out
        assert (files / "sweep.png").read_bytes().startswith(b"\x89PNG")
        assert len((files / "sweep.csv").read_text(encoding="utf-8").splitlines()) == 6

    def test_needs_no_training_images_for_methods_without_data(self, files, keras_module, capsys):
        data = dict(np.load(files / "data.npz"))
        np.savez(files / "test.npz", x_test=data["x_test"], y_test=data["y_test"][:, None])
        arguments = ["sweep", files / "model.keras", "--keras", keras_module.__name__]
        arguments += ["--data", files / "test.npz", "--methods", "svd", "--crs", 0.3]
        assert main([str(argument) for argument in arguments]) == 0
        assert '| `"svd"` |' in capsys.readouterr().out

    def test_retrains(self, files, keras_module, capsys):
        arguments = ["sweep", files / "model.keras", "--keras", keras_module.__name__]
        arguments += ["--data", files / "data.npz", "--methods", "alds", "--crs", 0.3]
        arguments += ["--calibration", 0, "--epochs", 1, "--train", 16, "--learning-rates", 0.01]
        assert main([str(argument) for argument in arguments]) == 0
        assert "After 1 epoch of 16 images:" in capsys.readouterr().out

    def test_complains(self, files, keras_module, capsys):
        kind = ["--keras", keras_module.__name__]
        x = np.zeros((4, 12, 12, 3))
        np.savez(files / "less.npz", x_test=x, y_test=np.zeros(4))
        np.savez(files / "one_hot.npz", x_test=x, y_test=np.zeros((4, 10)))
        np.save(files / "array.npy", x)
        (files / "half.npz").write_bytes((files / "data.npz").read_bytes()[:9000])
        for data, more, message in (
            ("less.npz", [], "less.npz to hold x_train. Received: no x_train"),
            ("less.npz", ["--epochs", "1", "--methods", "svd"], "no x_train and no y_train"),
            ("one_hot.npz", [], "Received: y_test of shape (4, 10) for 4 images"),
            ("half.npz", [], "a file that cannot be read"),
            ("array.npy", [], "no x_test and no y_test"),
            ("data.npz", ["--epochs", "-1"], "Expected --epochs and --calibration"),
            ("none.npz", [], "none.npz"),
            ("data.npz", ["--crs", "3"], "0 < cr < 1"),
        ):
            arguments = ["sweep", str(files / "model.keras"), "--data", str(files / data)]
            with pytest.raises(SystemExit) as info:
                main([*arguments, *kind, *more])
            assert info.value.code == 2
            assert message in capsys.readouterr().err

    def test_wants_a_classifier(self, files, keras_module, capsys):
        layers = keras_module.layers
        regression = keras_module.Sequential([layers.Input((12, 12, 3)), layers.Conv2D(8, 3)])
        regression.save(files / "regression.keras")
        with pytest.raises(SystemExit):
            main(
                ["sweep", str(files / "regression.keras"), "--data", str(files / "data.npz"),
                 "--keras", keras_module.__name__]
            )  # fmt: skip
        assert "Expected a classifier with one score for each class" in capsys.readouterr().err
