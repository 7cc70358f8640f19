"""What each command finds, writes and prints."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds import CompressionPlan
from keras_alds.cli import main
from keras_alds.kinds.base import is_factorized


@pytest.fixture
def folder(keras_module, tmp_path, monkeypatch):
    """A folder with a model and examples, in which commands run."""
    zoo.functional(keras_module).save(tmp_path / "model.keras")
    x, y = zoo.images(64)
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x, y_test=y)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs a command and returns what it prints; with `--json`, as an object."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    return run


def test_compress(folder, keras_module, run):
    """Also that the loading package is found, and that a plan that was written can be applied."""
    trained = zoo.functional(keras_module)
    trained.compile("adam", "mean_squared_error")
    trained.optimizer.build(trained.trainable_variables)
    trained.save("model.keras")
    outputs = ["-o", "small.keras", "--save-plan", "plan.json", "--report", "report.html"]
    calibration = ["--calibration", "x.npz", "--max-examples", "32"]
    options = ["--cr", "params=0.4,macs=0.3", "--exclude", "head", "--bounds", "hidden=:0.5"]
    found = run("compress", "model.keras", *options, *calibration, *outputs, "--json")
    small = keras_module.models.load_model("small.keras")
    model = keras_module.models.load_model("model.keras")
    assert found["figures"]["parameters"] == [model.count_params(), small.count_params()]
    assert small.count_params() <= 0.6 * model.count_params()
    plan = CompressionPlan.load("plan.json")
    assert json.loads(json.dumps(plan.to_dict())) == found["plan"]
    assert plan.requested == {"params": 0.4, "macs": 0.3}
    assert not is_factorized(small.get_layer("head"))
    assert found["written"]["output"] == "small.keras"
    before, after = found["figures"]["bytes of the file"]
    assert after == os.path.getsize("small.keras")
    assert after < before < 0.7 * os.path.getsize("model.keras")  # no optimizer in both
    page = Path("report.html").read_text(encoding="utf-8")
    assert f"{small.count_params():,}" in page
    assert "bytes of the file" in page

    again = ["--plan", "plan.json", *calibration, "--no-sequential", "--expand"]
    text = run("compress", "model.keras", *again, "-o", "expanded.h5")
    assert "| parameters " in text
    assert text.endswith("Written: expanded.h5\n")
    expanded = keras_module.models.load_model("expanded.h5", compile=False)
    assert expanded.count_params() == small.count_params()
    assert not any(is_factorized(layer) for layer in expanded.layers)


@pytest.mark.filterwarnings("ignore:The model .* is already compressed")
def test_compress_what_is_compressed(folder, run, capsys):
    model = zoo.functional(keras)
    keras_alds.compress(model, cr=0.4, method="energy").save("small.keras")
    again = ["compress", "small.keras", "--cr", "0.2", "-o", "copy.keras"]
    with pytest.raises(SystemExit) as info:
        run(*again, "--save-plan", "plan.json")
    assert info.value.code == 2
    assert "compressed so far already. Leave out --save-plan" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["model.keras", "small.keras", "x.npz"]
    assert run(*again).endswith("Written: copy.keras\n")


@pytest.mark.filterwarnings("always:The refinement was undone")
def test_compress_to_int8(tmp_path, monkeypatch, run, capsys):
    """With images of a folder; then `compare` and `convert` of what was written."""
    pytest.importorskip("ai_edge_litert")
    monkeypatch.chdir(tmp_path)
    model = zoo.functional(keras)
    model.save("model.keras")
    for n, image in enumerate(np.random.default_rng(0).uniform(0, 1, (12, 16, 12, 3))):
        (tmp_path / "photos" / str(n % 10)).mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(tmp_path / "photos" / str(n % 10) / f"{n}.png", image)
    photos = ["photos", "--scale", "0.004"]
    int8 = ["--quantize", "int8", "--tflite", "small.tflite"]
    cr = ["--cr", "0.4", "--refine", "1"]
    assert main(["compress", "model.keras", *cr, "--calibration", *photos, *int8]) == 0
    captured = capsys.readouterr()
    assert "| bytes of the int8 .tflite file |" in captured.out
    assert "keras_alds: warning: The refinement was undone: no gain" in captured.err
    file = keras_alds.litert.read_file("small.tflite")
    assert all(operator.weights.dtype == "int8" for operator in file.weighted)

    run("convert", "model.keras", "-o", "model.tflite", "--quantize", "float16")
    data = ["--data", *photos, "--runs", "2", "--json"]
    found = run("compare", "model.keras", "small.tflite", *data)
    assert found["first"]["macs"] == keras_alds.count_macs(model)
    assert found["second"]["size"] == os.path.getsize("small.tflite")
    assert found["second"]["macs"] == file.macs < found["first"]["macs"]
    assert 0 <= found["first"]["metrics"]["accuracy"] <= 1
    assert found["latency_ratio"] > 0
    text = run("compare", "model.tflite", "small.tflite", "--runs", "0")
    assert "| MACs " in text
    assert "| ms " not in text
    with pytest.raises(SystemExit):
        run("compare", "model.tflite", "small.tflite", "--quantize", "int8")
    assert "two .tflite files, which are compared as they are" in capsys.readouterr().err


def test_inspect(folder, keras_module, run):
    found = run("inspect", "model.keras", "--exclude", "head", "--json")
    rows = {row["layer"]: row for row in found["layers"]}
    assert rows["head"]["skipped"] == "excluded"
    assert rows["stem"]["kernel"] == [3, 3, 3, 16]
    assert rows["stem"]["rank"] == 16
    assert 1 <= rows["stem"]["rank_of_energy"]["0.9"] <= rows["stem"]["rank_of_energy"]["0.99"]
    most = found["reachable"]["params"]
    assert 0 <= most["cpu"] <= most["size"] < 1
    ratios = [point["cr"] for point in found["curve"]]
    assert ratios == sorted(set(ratios))
    assert ratios[-1] <= most["size"]
    assert all(point["divergence"] is None for point in found["curve"])
    small = keras_alds.compress(zoo.functional(keras_module), 0.4, method="energy")
    small.save("small.keras")
    options = ["--calibration", "x.npz", "--target", "size", "--exclude", "head"]
    text = run("inspect", "small.keras", *options)
    assert "The model is compressed. All figures are of its dense form." in text
    assert f"of {found['dense_params']:,} parameters" in text
    assert "| Output |" in text
    assert f"Skipped (excluded): 1 layer, {rows['head']['params']:,} params (head): " in text


def test_inspect_a_model_of_sequences_of_any_length(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    layers = keras.layers
    model = [keras.Input((None,)), layers.Embedding(99, 32), layers.LSTM(24), layers.Dense(2)]
    keras.Sequential(model).save("text.keras")
    found = run("inspect", "text.keras", "--json")
    assert found["sizes"]["MACs"] is None
    assert found["reachable"].keys() == {"params"}
    assert found["curve"]


def test_h5_files_with_names_that_keras_3_refuses(tmp_path, run):
    tf_keras = pytest.importorskip("tf_keras")
    layers = [tf_keras.layers.InputLayer((32,)), tf_keras.layers.Dense(64, name="head/dense")]
    with pytest.warns(UserWarning, match="HDF5"):
        tf_keras.Sequential(layers).save(tmp_path / "old.h5")
    assert "head/dense (Dense)" in run("inspect", tmp_path / "old.h5")


@pytest.mark.both
def test_no_file_runs_its_code(tmp_path, monkeypatch, keras_module, capsys):
    """Neither a `.keras` nor an `.h5` file, nor a SavedModel folder."""
    monkeypatch.chdir(tmp_path)
    L = keras_module.layers
    run = L.Lambda(lambda x: (__import__("pathlib").Path("ran").touch(), x)[1])
    model = keras_module.Sequential([L.InputLayer((32,)), run, L.Dense(64)])
    names = ["lambda.keras", "lambda.h5"] + ["lambda"] * (keras_module is not keras)
    for name in names:
        model.save(name)
        Path("ran").unlink(missing_ok=True)
        with contextlib.suppress(SystemExit):
            main(["inspect", name, "--keras", keras_module.__name__])
            assert name == "lambda"  # the graph in the folder stands for the code
        assert not Path("ran").exists()
        assert name == "lambda" or "holds code, which is not run" in capsys.readouterr().err


def test_own_classes(tmp_path, monkeypatch, run, capsys):
    """They are loaded from the file that defines them, which only runs if it is named."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "import keras\n\nclass Twice(keras.layers.Layer):\n    def call(self, x):\n"
        "        return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own

    layers = [keras.Input((32,)), keras.layers.Dense(64), own.Twice(), keras.layers.Dense(32)]
    keras.Sequential(layers).save("own.keras")
    monkeypatch.delitem(sys.modules, "own")
    for code in ("own.py", "own"):
        output = ["-o", "small.keras", "--force", "--method", "energy"]
        run("compress", "own.keras", "--cr", "0.3", "--custom", code, *output)
        assert keras.models.load_model("small.keras", custom_objects={"Twice": own.Twice})
    keras.Sequential([*layers, keras.layers.Lambda(lambda x: x + 1)]).save("lambda.keras")
    with pytest.raises(SystemExit):
        main(["plan", "lambda.keras", "--custom", "own"])
    assert "its Lambda layer holds code, which is not run" in capsys.readouterr().err
    Path("own.py").write_text("1 / 0")
    for code, reason in (("own.py", "ZeroDivisionError"), ("none", "No module named 'none'")):
        with pytest.raises(SystemExit) as info:
            main(["plan", "own.keras", "--custom", code])
        assert info.value.code == 2
        assert reason in capsys.readouterr().err
