"""The life of a compressed model: trained on, copied, saved, exported, run in a fresh process.

Every kind of model lives in both Keras 3 and tf_keras. One fresh process runs all files of each.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boxes
import keras
import numpy as np
import pytest
import tf_keras
import zoo

import keras_alds

ROOT = Path(__file__).resolve().parent.parent


def autoencoder(K: Any) -> Any:
    """A model of models."""
    L = K.layers
    encoder = K.Sequential([K.Input((16,)), L.Dense(24, "relu"), L.Dense(16)], name="encoder")
    decoder = K.Sequential([K.Input((16,)), L.Dense(24, "relu"), L.Dense(16)], name="decoder")
    inputs = K.Input((16,))
    return K.Model(inputs, decoder(encoder(inputs)))


def sequence(K: Any) -> Any:
    """Attention, and recurrent layers in a wrapper."""
    L = K.layers
    inputs = K.Input((6, 16))
    x = L.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    x = L.Bidirectional(L.LSTM(8), name="both_ways")(x)
    return K.Model(inputs, L.Dense(6, name="head")(x))


def with_own_layers(K: Any) -> Any:
    box = boxes.CLASSES[K.__name__].box
    inputs = K.Input((16,))
    x = box([24, [20, 24], 16], holder="list")(inputs)
    x = box([24, 16], holder="sequential", late=True)(x)
    return K.Model(inputs, K.layers.Dense(6, name="head")(x))


def with_a_backbone(K: Any) -> Any:
    inputs = K.Input((16,))
    x = boxes.CLASSES[K.__name__].backbone(name="backbone")(inputs)
    return K.Model(inputs, K.layers.Dense(6, name="head")(x))


def subclassed(K: Any) -> Any:
    model = boxes.CLASSES[K.__name__].net()
    model(np.zeros((1, 16), "float32"))
    return model


MODELS = {
    function.__name__: function
    for function in (
        *(zoo.functional, zoo.shared, zoo.wrapped, autoencoder, sequence),
        *(with_own_layers, with_a_backbone, subclassed),
    )
}


def inputs_of(model: Any) -> Any:
    shapes = [tuple(i.shape)[1:] for i in (getattr(model, "inputs", None) or [])] or [(16,)]
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((8, *shape)).astype("float32") for shape in shapes]
    return inputs if len(inputs) > 1 else inputs[0]


def compressed_and_trained(K: Any, kind: str, way: str) -> tuple[Any, Any]:
    """The model and its inputs."""
    K.utils.set_random_seed(0)
    model = MODELS[kind](K)
    x = inputs_of(model)
    y = model(x, training=False)
    y = [np.zeros(o.shape, "float32") for o in y] if isinstance(y, list) else np.zeros(y.shape)
    loss = K.losses.MeanSquaredError
    model.compile("adam", [loss() for _ in y] if isinstance(y, list) else loss())
    if way == "compress":
        model = keras_alds.compress(model, 0.3)
        model.fit(x, y, verbose=0)
    else:
        callback = keras_alds.ALDSCompress(0.3, at_epoch=1, verbose=0)
        model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    return model, x


def _built(copied: Any, model: Any, x: Any) -> Any:
    copied(x)
    copied.set_weights(model.get_weights())
    return copied


def lives_to_live() -> list[Any]:
    """Every kind of model: in Keras 3 compressed in one way, in tf_keras in the other."""
    ways, long = ("compress", "in_fit"), pytest.mark.long
    return [
        pytest.param(library, kind, ways[(i + j) % 2], marks=[long] if (i + j // 2) % 2 else [])
        for i, library in enumerate(("keras", "tf_keras"))
        for j, kind in enumerate(MODELS)
    ]


COPIES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "deepcopy": lambda K, model, x: copy.deepcopy(model),
    "pickle": lambda K, model, x: pickle.loads(pickle.dumps(model)),
    "clone_model": lambda K, model, x: _built(K.models.clone_model(model), model, x),
    "from_config": lambda K, model, x: _built(
        type(model).from_config(model.get_config()), model, x
    ),
}
FILES: dict[str, Callable[[Any, str], Any]] = {
    ".keras": lambda model, path: model.save(path),
    ".h5": lambda model, path: model.save(path),
    "_as_folder": lambda model, path: model.save(path, save_format="tf"),
    "_as_export": lambda model, path: model.export(path),
    ".tflite": lambda model, path: keras_alds.litert.convert(model, path, batch_size=8, verbose=0),
}


def impossible(library: str, kind: str, what: str) -> bool:
    """What Keras cannot do with the dense model either."""
    if what == ".h5":  # tf_keras cannot write two weights of one layer with the same name
        return kind == "subclassed" or (library == "tf_keras" and kind == "with_own_layers")
    return what == "_as_folder" and library == "keras"


def outputs_of_copy(make: Callable[..., Any], K: Any, model: Any, x: Any) -> np.ndarray:
    return zoo.outputs(make(K, model, x), x)


def attempted(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function, or its error as a text."""
    try:
        return function(*arguments)
    except Exception as error:
        return repr(error)[:900]


@pytest.fixture(scope="module")
def lives(
    parameters_of: Callable[[str], list[dict[str, str]]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, dict[str, Any]]]:
    """The lives of one library; `pytest -n 2` may live those of each in another process."""

    @functools.cache
    def of_library(library: str) -> dict[str, dict[str, Any]]:
        chosen = [life for life in parameters_of("test_life") if life["library"] == library]
        return lived(chosen, tmp_path_factory.mktemp("lives"))

    return of_library


def lived(chosen: list[dict[str, str]], folder: Path) -> dict[str, dict[str, Any]]:
    """For each life, the outputs of the model, of its copies and of its files, or errors."""
    lives: dict[str, dict[str, Any]] = {}
    for life in chosen:
        library, kind, way = life["library"], life["kind"], life["way"]
        K = {"keras": keras, "tf_keras": tf_keras}[library]
        name = f"{library}-{kind}-{way}"
        model, x = compressed_and_trained(K, kind, way)
        lives[name] = found = {"model": zoo.outputs(model, x)}
        np.savez(folder / f"{name}.npz", *(x if isinstance(x, list) else [x]))
        for what, make in COPIES.items():
            found[what] = attempted(outputs_of_copy, make, K, model, x)
        for ending, save in FILES.items():
            if not impossible(library, kind, ending):
                path = str(folder / f"{name}{ending}")
                found[ending] = attempted(save, model, path)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "life.py"), str(folder)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    outputs = dict(np.load(folder / "outputs.npz"))
    for file, result in {**json.loads(str(outputs.pop("failed"))), **outputs}.items():
        name = file.split(".")[0].split("_as_")[0]
        lives[name][file.removeprefix(name)] = result
    return lives


@pytest.mark.parametrize(("library", "kind", "way"), lives_to_live())
def test_life(library: str, kind: str, way: str, lives: Callable[[str], Any]) -> None:
    life = dict(lives(library)[f"{library}-{kind}-{way}"])
    expected = life.pop("model")
    errors = {what: outputs for what, outputs in life.items() if isinstance(outputs, str)}
    assert not errors
    assert len(life) == len(COPIES) + len(FILES) - sum(
        impossible(library, kind, what) for what in FILES
    )
    for what, outputs in life.items():
        np.testing.assert_allclose(outputs, expected, atol=2e-5, err_msg=what)


# -- Containers at random --------------------------------------------------------------------------


def random_tree(random: np.random.Generator, depth: int) -> list[Any]:
    """Widths and trees; the last width is that of the inputs, which a box adds."""
    parts: list[Any] = []
    for _ in range(random.integers(1, 3)):
        inner = depth > 0 and random.random() < 0.4
        parts.append(random_tree(random, depth - 1) if inner else int(random.choice([16, 20, 24])))
    return [*_joined(parts), 16]


def _joined(parts: list[Any]) -> list[Any]:
    """A box takes 16 inputs, so a layer of 16 comes before it."""
    joined: list[Any] = []
    for part in parts:
        if isinstance(part, list) and joined and joined[-1] != 16:
            joined.append(16)
        joined.append(part)
    return joined


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 8))]
)
def test_containers_at_random(seed: int, keras_module: Any, tmp_path: Path) -> None:
    """Own layers in own layers, lists, dicts; shared, frozen, built late."""
    K, random = keras_module, np.random.default_rng(seed)
    K.utils.set_random_seed(seed)
    box = boxes.CLASSES[K.__name__].box
    inputs, frozen = K.Input((16,)), False
    x = inputs
    for _ in range(random.integers(1, 4)):
        layer = box(
            random_tree(random, 2),
            holder=str(random.choice(boxes.HOLDERS)),
            late=bool(random.random() < 0.5),
        )
        layer.trainable = bool(random.random() < 0.8)
        frozen |= not layer.trainable
        x = layer(x)
        if random.random() < 0.4:
            x = layer(x)  # shared
    model = K.Model(inputs, K.layers.Dense(6)(x))
    model.compile("adam", K.losses.MeanSquaredError())
    data = random.standard_normal((8, 16)).astype("float32")
    calibration = {"calibration_data": data} if seed % 2 else {}
    small = keras_alds.compress(model, 0.2, **calibration)
    small.train_on_batch(data, np.zeros((8, 6)))
    small.save(tmp_path / "small.keras")
    loaded = K.models.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(zoo.outputs(loaded, data), zoo.outputs(small, data), atol=1e-6)
    if frozen:
        return  # Keras does not freeze the layers inside a frozen layer again
    for trained in (loaded, small):
        trained.train_on_batch(data, np.zeros((8, 6)))
    np.testing.assert_allclose(zoo.outputs(loaded, data), zoo.outputs(small, data), atol=1e-5)
