"""The command line: what it writes, and how it complains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import zoo

from keras_alds import CompressionPlan, select
from keras_alds._backend import saved_by
from keras_alds.cli import COMMANDS, compress, main
from keras_alds.cli.answers import as_json


@pytest.fixture
def saved(keras_module, tmp_path):
    model = zoo.functional(keras_module)
    path = tmp_path / "model.keras"
    model.save(path)
    return model, path, ["--keras", keras_module.__name__]


def complaint(capsys, *arguments):
    """What a command writes to standard error; it must be one line and end with status 2."""
    with pytest.raises(SystemExit) as info:
        main([str(argument) for argument in arguments])
    assert info.value.code == 2
    out, text = capsys.readouterr()
    assert out == ""
    assert text.count("\n") == 1
    return text


def test_plan(saved, tmp_path, capsys):
    model, path, options = saved
    output = tmp_path / "plan.json"
    arguments = ["plan", str(path), *options, "--cr", "0.4", "--target", "tflite"]
    assert main([*arguments, "--exclude", "head", "--output", str(output)]) == 0
    assert CompressionPlan.load(output) == select(model, 0.4, target="litert", exclude=["head"])
    assert "Compression plan: cr=0.4 of params requested" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You are saving")
def test_bad_input_ends_with_status_2(saved, tmp_path, capsys, monkeypatch):
    _, path, options = saved
    assert "which does not exist" in complaint(capsys, "plan", tmp_path / "none.keras")
    (tmp_path / "bad.keras").write_text("no model")
    text = complaint(capsys, "plan", tmp_path / "bad.keras", *options)
    assert "bad.keras, a file of another kind. Write one with `model.save`" in text
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    assert "x.npz, a file of another kind." in complaint(capsys, "plan", tmp_path / "x.npz")
    assert f"{tmp_path}, a folder." in complaint(capsys, "plan", tmp_path, *options)
    assert "0 < cr < 1" in complaint(capsys, "plan", path, *options, "--cr", "50")
    assert "is not reachable" in complaint(capsys, "plan", path, *options, "--cr", "0.9999")
    assert "invalid choice" in complaint(capsys, "plan", path, "--method", "magic")
    text = complaint(capsys, "plan", path, *options, "--method", "activation")
    assert "Expected `calibration_data` for the method 'activation'" in text
    assert "required: command" in complaint(capsys)
    monkeypatch.setattr(os, "access", lambda file, mode: mode != os.R_OK)
    assert "model.keras, which you may not read." in complaint(capsys, "plan", path, *options)


def test_bad_arguments_of_compress_end_before_the_work(saved, tmp_path, capsys, monkeypatch):
    """Before TensorFlow reads the model."""
    _, path, _ = saved
    monkeypatch.setattr(compress, "read_model", None)
    output, tflite = ["-o", tmp_path / "a.keras"], ["--tflite", tmp_path / "a.tflite"]
    for text, *arguments in (
        ("Expected a file to write", "--cr", "0.5"),
        ("Expected either --cr, such as --cr 0.5 to remove half, or --plan. Received: n", *output),
        ("Expected --tflite FILE with", "--cr", "0.5", *output, "--quantize", "int8"),
        ("Expected -o FILE with --expand", "--cr", "0.5", *tflite, "--expand"),
        ("Expected --calibration with --quantize int8", "--cr", "1", *tflite, "--quantize", "int8"),
        ("none.json (No such file or directory)", "--plan", tmp_path / "none.json", *output),
        ("not JSON", "--plan", path.with_name("text.json"), *output),
        ("invalid fraction value: 'params=x'", "--cr", "params=x", *output),
        ("invalid layer_bounds value: '0.3'", "--bounds", "0.3", *output),
        ("-o/--output: expected one argument", "-o"),
        ("model.keras, which exists. Pass --force", "-o", path),
    ):
        path.with_name("text.json").write_text("text")
        assert text in complaint(capsys, "compress", path, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["model.keras", "text.json"]
    for command in (("convert", path, "-o", tmp_path / "a.tflite"), ("compare", path, path)):
        for quantize in ((), ("--quantize", "float16")):
            text = complaint(capsys, *command, "--representative", "x.npz", *quantize)
            assert "Expected --quantize int8 with --representative x.npz" in text
    text = complaint(capsys, "plan", "--exclude", "head", path)
    assert "required: model. Options of several values, such as --exclude" in text
    assert complaint(capsys, "plan").endswith("required: model\n")


def scaled(x):
    return 2 * x


@pytest.mark.filterwarnings("ignore:You are saving")
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_files_that_do_not_load_give_one_sentence(keras_module, ending, tmp_path, capsys):
    L = keras_module.layers

    class Own(L.Layer):
        def call(self, x):
            return x

    Own.__module__ = scaled.__module__ = "elsewhere"  # a script that is not imported here

    def complaint_of(*layers, path=tmp_path / f"model.{ending}"):
        model = keras_module.Sequential([keras_module.Input((8,)), *layers])
        model.save(path)
        model.save_weights(tmp_path / "model.weights.h5")
        return complaint(capsys, "plan", path, "--keras", keras_module.__name__)

    unknown = "its class or function {!r} is not known here: name the Python file that defines it "
    for layer, name in ((Own(), "Own"), (L.Dense(4, activation=scaled), "scaled")):
        text = complaint_of(L.Dense(9, activation="relu"), layer)
        assert unknown.format(name) in text
        assert len(text) < 600
    content = (tmp_path / f"model.{ending}").read_bytes()
    damaged = tmp_path / f"damaged.{ending}"
    damaged.write_bytes(content[: len(content) // 2])
    assert "Expected the file of a saved model" in complaint(capsys, "plan", damaged)
    text = complaint(
        capsys, "plan", tmp_path / "model.weights.h5", "--keras", keras_module.__name__
    )
    assert "model.weights.h5, which holds weights without their model." in text
    assert len(text) < 300


@pytest.mark.parametrize("part", ["metadata.json", "config.json", "model.weights.h5"])
def test_a_file_with_damaged_bytes_gives_one_sentence(part, tmp_path, capsys):
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((8,)), keras.layers.Dense(9)]).save(path)
    with zipfile.ZipFile(path) as saved:
        content = saved.read(part)[:40]
    path.write_bytes(path.read_bytes().replace(content, content[::-1]))
    assert saved_by(path) == "keras"
    if part != "metadata.json":  # Keras does not need that
        text = complaint(capsys, "plan", path)
        assert f"Expected a model that keras can load. Received: {path} (Bad CRC-32" in text


def test_json_has_no_nan_and_no_types_of_numpy():
    document = {"a": [np.float32(0.5), float("nan")], "b": {1: (np.arange(2), np.int64(3))}}
    assert json.loads(as_json(document)) == {"a": [0.5, None], "b": {"1": [[0, 1], 3]}}


# Everything about a fresh process in one: what is loaded, and what is written.
CODE = """
import runpy, sys

path = sys.argv[1]

def run(*arguments):
    sys.argv = ["keras_alds", *arguments]
    try:
        runpy.run_module("keras_alds", run_name="__main__")
    except SystemExit as end:
        assert not end.code, arguments

from keras_alds.cli import COMMANDS

for arguments in (["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)):
    run(*arguments)
    assert not {"tensorflow", "keras"} & set(sys.modules), arguments
run("plan", path, "--cr", "0.4")
assert "tensorflow" in sys.modules
"""


def test_help_without_tensorflow_and_no_line_of_its_log(tmp_path):
    zoo.functional(keras).save(tmp_path / "model.keras")
    environment = {name: value for name, value in os.environ.items() if name[:3] != "TF_"}
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model.keras")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("keras_alds 0.")
    assert "compare methods" in run.stdout
    assert "--max-slices" in run.stdout
    for name in COMMANDS:
        assert f"usage: keras_alds {name} " in run.stdout
        assert f"examples:\n  keras_alds {name}" in run.stdout
    assert "Compression plan: cr=0.4" in run.stdout
    assert run.stderr == ""
