"""The register of kinds: a kind comes with its file and goes with it; layers for tf_keras."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_alds
from keras_alds import count_macs, layers, select
from keras_alds.core.slicing import convolution_unfolding
from keras_alds.kinds import base
from keras_alds.kinds.dense import BaseFactorizedDense

PACKAGE = Path(keras_alds.__file__).parent
REMOVABLE = ("attention", "embedding", "recurrent")


class Projection(keras.layers.Layer):
    """A layer that no Keras has: rows times a matrix, and that times two."""

    activity_regularizer = matrix_initializer = matrix_regularizer = matrix_constraint = None

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, input_shape):
        self.matrix = self.add_weight(shape=(input_shape[-1], self.width), name="matrix")

    def call(self, inputs):
        return 2 * keras.ops.matmul(inputs, self.matrix)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class FactorizedProjection(BaseFactorizedDense, keras.layers.Layer):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training)


class ProjectionKind(base.KernelKind):
    kernel, part, sample = "matrix", "matrix", (1,)
    kept = {}  # noqa: RUF012
    output_axes = (-1,)

    def stock_class(self, backend):
        return Projection

    def unfolding(self, layer):
        return convolution_unfolding(0)

    def arguments(self, layer):
        return {"units": layer.width, "use_bias": False}

    def input_shape(self, layer):
        return (None, *layer.matrix.shape[:1])

    def written_out(self, writer, layer, axes):
        new = Projection(layer.kernel.shape[-1], name=layer.name)
        writer.record(layer, new, [writer.value(layer.kernel)])
        return [new]


@pytest.fixture
def made_up(monkeypatch):
    """A made-up kind that is known while a test runs."""
    for name in ("KINDS", "_OWN"):
        monkeypatch.setattr(base, name, dict(getattr(base, name)))
    base.register(ProjectionKind("Projection", FactorizedProjection))
    yield
    base._stock_kinds.cache_clear()


def projecting():
    inputs = keras.Input((5, 24))
    x = Projection(32, name="first")(inputs)
    return keras.Model(inputs, Projection(24, name="second")(x))


def test_a_kind_is_one_registration(made_up):
    """Selected, counted, calibrated, factorized and written out, without a word anywhere else."""
    model = projecting()
    x = np.random.default_rng(0).standard_normal((16, 5, 24)).astype("float32")
    plan = select(model, 0.4, objective="macs")
    assert {choice.layer for choice in plan.factorized} == {"first", "second"}
    assert plan.costs["macs"].before == count_macs(model) == 5 * 2 * 24 * 32
    small = keras_alds.compress(model, 0.4, calibration_data=x)
    assert type(small.get_layer("first")) is FactorizedProjection
    assert small.count_params() < 0.6 * model.count_params()
    full = keras_alds.compress(model, plan=select(model, 0.05, max_slices=1))
    difference = np.abs(full.predict(x, verbose=0) - model.predict(x, verbose=0)).max()
    assert difference < np.abs(model.predict(x, verbose=0)).max()
    stock = keras_alds.expand(small)
    assert type(stock.get_layer("first")) is Projection
    np.testing.assert_allclose(
        stock.predict(x, verbose=0), small.predict(x, verbose=0), rtol=1e-4, atol=1e-4
    )


def test_an_unknown_kind_is_left_alone():
    model = projecting()
    with pytest.raises(ValueError, match=r"'first' and 1 more.*Projection has no"):
        select(model, 0.4)
    assert count_macs(model) == 0


def imports(path):
    """The modules that a module imports by `from … import`, with what it takes from each."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{name.name}" for node in found for name in node.names}


@pytest.mark.parametrize("name", REMOVABLE)
def test_only_the_lists_know_a_removable_kind(name):
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(f"{found}.".startswith(f"keras_alds.kinds.{name}.") for found in imports(path))
    }
    # `narrow_heads` is about attention alone: it goes where attention goes.
    about = {"models/heads.py", "models/head_widths.py"} if name == "attention" else set()
    assert users == {"kinds/__init__.py", "layers.py"} | about


@pytest.mark.slow
def test_kinds_go_with_their_files(tmp_path):
    copy = tmp_path / "keras_alds"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    register, public = copy / "kinds" / "__init__.py", copy / "layers.py"
    for name in REMOVABLE:
        (copy / "kinds" / f"{name}.py").unlink()
        lines = register.read_text(encoding="utf-8").splitlines(keepends=True)
        register.write_text("".join(line for line in lines if name not in line), encoding="utf-8")
        text = public.read_text(encoding="utf-8")
        statement = rf"from keras_alds\.kinds\.{name} import (\([^)]*\)|[^\n]*)\n"
        taken = re.findall(r"Factorized\w+", re.search(statement, text).group(1))
        text = re.sub(statement, "", text)
        for taken_name in taken:
            text = text.replace(f'    "{taken_name}",\n', "")
        public.write_text(text, encoding="utf-8")
    code = """
import keras, numpy as np, keras_alds, keras_alds.layers
L = keras.layers
x = inputs = keras.Input((8, 8, 3))
for filters in (16, 24):
    x = L.Conv2D(filters, 3, activation="relu")(x)
model = keras.Model(inputs, L.Dense(10)(L.Flatten()(x)))
images = np.random.default_rng(0).standard_normal((16, 8, 8, 3)).astype("f")
small = keras_alds.compress(model, 0.4, calibration_data=images)
stock = keras_alds.expand(small)
assert stock.count_params() <= 0.6 * model.count_params()
sequence = keras.Sequential([keras.Input((5, 16)), L.LSTM(16), L.Dense(64), L.Dense(64)])
print([c.kind for c in keras_alds.select(sequence, 0.2).choices], keras_alds.__file__)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    expected = f"['LSTMCell', 'Dense', 'Dense'] {copy / '__init__.py'}"
    assert run.stdout.strip() == expected, run.stderr[-2000:]


def test_layers_for_tf_keras_are_those_for_keras_3():
    tf_keras = pytest.importorskip("tf_keras")
    ours = keras_alds.tf_keras
    names = set(layers.__all__) - {"choose_form", "FactorizedGroupQueryAttention"}
    assert set(ours.__all__) == names
    registered = tf_keras.saving.get_custom_objects()
    for name in names:
        cls, of_keras_3 = getattr(ours, name), getattr(layers, name)
        assert (cls.__module__, cls.__qualname__) == ("keras_alds.tf_keras", name)
        assert issubclass(cls, tf_keras.layers.Layer)
        assert not issubclass(cls, keras.layers.Layer)
        assert inspect.signature(cls) == inspect.signature(of_keras_3)
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert registered[name] is cls
        assert tf_keras.saving.get_registered_object(f"keras_alds>{name}") is cls
        text = inspect.getdoc(cls)
        assert text.splitlines()[0] == inspect.getdoc(of_keras_3).splitlines()[0]
        assert f"from keras_alds.tf_keras import {name}" in text
        assert "from keras_alds.layers" not in text
