"""Examples that users name: files, folders of images, TensorFlow Datasets."""

from __future__ import annotations

import argparse
import re
import sys
import types

import keras
import numpy as np
import pytest

from keras_alds.cli.data import Inputs, add_examples, read_examples, read_labelled

IMAGE = Inputs(("pixels",), ((6, 4, 3),))


def read(source, *more, inputs=IMAGE, part="train", labels=False):
    parser = argparse.ArgumentParser()
    add_examples(parser, "--data", "examples")
    arguments = parser.parse_args(["--data", str(source), *more])
    return read_labelled(arguments, arguments.data, inputs, part, labels=labels)


def complaint(*arguments, **options):
    with pytest.raises(ValueError, match="Received: ") as info:
        read(*arguments, **options)
    return str(info.value)


def test_arrays_of_files(tmp_path):
    path, x, y = tmp_path / "x.npz", np.arange(40.0).reshape(10, 4), np.arange(10)
    np.savez(path, x_train=x, y_train=y[:, None], x_test=x + 1, y_test=y + 1, extra=x)
    assert (read(path)[0] == x).all()
    found, labels = read(path, "--max-examples", "5", part="test", labels=True)
    assert (found == x[::2] + 1).all()
    assert (labels == y[::2] + 1).all()
    assert labels.shape == (5,)
    scaled = read(path, "--scale", "0.5")[0]
    assert scaled.dtype == np.float32
    assert (scaled == x / 2).all()
    np.save(tmp_path / "x.npy", x)
    assert (read(tmp_path / "x.npy")[0] == x).all()
    np.savez(path, photos=x, y=y)  # the only one without labels
    assert (read(path, labels=True)[0] == x).all()
    np.savez(path, left=x, right=x + 1, y=y)
    several = read(path, "--scale", "2", inputs=Inputs(("left", "right"), ((4,), (4,))))[0]
    assert (several["right"] == 2 * (x + 1)).all()


def test_files_that_do_not_fit(tmp_path):
    path, x = tmp_path / "x.npz", np.zeros((10, 4))
    assert "or a folder of images. Received: " in complaint(path)
    path.write_text("no array")
    assert "to be an .npz file of arrays" in complaint(path)
    np.savez_compressed(path, np.random.default_rng(0).normal(size=(99, 9)))
    content = path.read_bytes()
    path.write_bytes(content[:500] + content[500:1500][::-1] + content[1500:])
    assert "to be an .npz file of arrays" in complaint(path)
    np.savez(path, a=x, b=x)
    assert "as x_train or x, or one array for each of the inputs pixels. Received: a, b" in (
        complaint(path)
    )
    assert "for each of the inputs a, c. Received: a, b" in (
        complaint(path, inputs=Inputs(("a", "c"), ((4,), (4,))))
    )
    np.savez(path, x=x, y=np.zeros(9))
    assert "a label for each of 10 examples. Received: 9" in complaint(path)
    np.savez(path, x=x)
    assert "Expected labels beside the examples" in complaint(path, labels=True)
    np.savez(path, x=1)
    assert "one number as x" in complaint(path)
    assert "--max-examples to be 1 or more" in complaint(path, "--max-examples", "0")


def test_images_of_folders(tmp_path):
    for name, value in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        image = np.full((12, 16, 3), value, "uint8")
        image[:, :4] = image[:, -4:] = 99  # cut off: the model takes 6×4
        keras.utils.save_img(tmp_path / name / "1.PNG", image, scale=False)
    (tmp_path / "notes.txt").touch()
    x, y = read(tmp_path, labels=True)
    assert x.shape == (2, 6, 4, 3)
    np.testing.assert_allclose(x.mean((1, 2, 3)), [10, 200])
    assert (y == [0, 1]).all()
    grey, _ = read(tmp_path, "--max-examples", "1", inputs=Inputs((), ((None, None, 1),)))
    assert grey.shape == (1, 12, 16, 1)
    keras.utils.save_img(tmp_path / "cat.png", np.zeros((5, 4, 3)), scale=False)
    assert read(tmp_path)[1] is None
    assert "of 2 sizes, such as (5, 4, 1) and (12, 16, 1)" in complaint(
        tmp_path, inputs=Inputs((), ((None, None, 1),))
    )
    assert "one with inputs of shape (7,)" in complaint(tmp_path, inputs=Inputs((), ((7,),)))
    (tmp_path / "cat.png").write_text("no image")
    assert re.search(r"Expected an image.*cat\.png, which cannot be read", complaint(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "empty, which has no images" in complaint(tmp_path / "empty")


def test_tensorflow_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        read("tfds:mnist")

    def load(name, split, **_):
        if name != "mnist":
            raise LookupError(*["no such name\nand more"] * (name == "other"))
        return [{"image": np.full((6, 4, 1), n), "label": n} for n in range(len(split))]

    fake = types.SimpleNamespace(load=load, as_numpy=iter)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    x, y = read("tfds:mnist:test[:50%]", "--max-examples", "3", labels=True)
    assert x.shape == (3, 6, 4, 3)
    assert (y == [0, 1, 2]).all()
    assert len(read("tfds:mnist", part="train")[1]) == len("train")
    assert complaint("tfds:other").endswith("tfds:other (LookupError: no such name)")
    assert complaint("tfds:silent").endswith("tfds:silent (LookupError: )")


def test_examples_of_a_model(keras_module, tmp_path):
    """The names and sizes are those of the model's inputs."""
    L = keras_module.layers
    inputs = [keras_module.Input((4,), name=name) for name in ("one", "two")]
    model = keras_module.Model(inputs, L.Concatenate()(inputs))
    np.savez(tmp_path / "x.npz", one=np.zeros((3, 4)), two=np.ones((3, 4)))
    parsed = argparse.Namespace(scale=1.0, max_examples=8)
    assert set(read_examples(parsed, str(tmp_path / "x.npz"), model)) == {"one", "two"}
    assert read_examples(parsed, None, model) is None
