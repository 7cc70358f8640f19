"""Examples that users name: .npz and .npy files, folders of images, TensorFlow Datasets."""

from __future__ import annotations

import argparse
import itertools
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_alds.extras import imported

SOURCES = ".npz or .npy file, folder of images, or tfds:NAME[:SPLIT]"
#: The endings of images in a folder.
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")


class Inputs(NamedTuple):
    """The inputs of a model or file: names, and shapes without the examples."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of(cls, model: Any) -> Inputs:
        """The inputs of a Keras model; of unknown ones, none."""
        from keras_alds import _backend
        from keras_alds._backend import tensors

        backend = _backend.backend_of(model)
        try:
            specs = tensors.flatten(backend.input_specs(model))
        except ValueError:
            specs = []
        shapes = tuple(tuple(spec.shape)[1:] for spec in specs)
        return cls(tuple(backend.input_names(model)), shapes)

    @property
    def image(self) -> tuple[int | None, int | None, int]:
        """Height, width and channels of the image that the model takes.

        Raises:
            ValueError: If it takes something else.
        """
        if len(self.shapes) == 1 and len(self.shapes[0]) == 3:
            height, width, channels = self.shapes[0]
            if channels in (1, 3, 4):
                return height, width, channels
        raise ValueError(
            "Expected a model of one image [height, width, channels] with 1, 3 or 4 channels, to "
            f"read images for it. Received: one with inputs of shape "
            f"{', '.join(map(str, self.shapes)) or 'unknown'}. Save the examples as an .npz file."
        )


def add_examples(
    parser: argparse.ArgumentParser, flag: str, help: str, most: int | None = 1024
) -> None:
    """Adds the arguments for examples.

    Args:
        parser: The parser of a command.
        flag: The name, such as `"--calibration"`.
        help: What they are for.
        most: How many are read by default; None for all.
    """
    parser.add_argument(flag, metavar="SOURCE", help=f"{help}: {SOURCES}")
    add_scale(parser)
    parser.add_argument(
        "--max-examples",
        type=int,
        default=most,
        help=f"examples to read at most (default: {most or 'all'})",
    )


def add_scale(parser: argparse.ArgumentParser) -> None:
    """Adds the argument for the scale of the pixels."""
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply the examples by this (default: 1)"
    )


def read_examples(arguments: argparse.Namespace, source: str | None, model: Any) -> Any:
    """Examples for a model, without labels; None without a source.

    Raises:
        ValueError: If they cannot be read, or do not fit the model.
        ImportError: If they are of TensorFlow Datasets, and it is not installed.
    """
    if source is None:
        return None
    return read_labelled(arguments, source, Inputs.of(model), "train", labels=False)[0]


def read_labelled(
    arguments: argparse.Namespace, source: str, inputs: Inputs, part: str, *, labels: bool = True
) -> tuple[Any, Any]:
    """Examples and their labels.

    Args:
        arguments: The arguments of `add_examples`.
        source: What the user named.
        inputs: The inputs of the model.
        part: The part of the data that is taken, if there are several: "train" or "test".
        labels: Whether there have to be labels.

    Raises:
        ValueError: If they cannot be read, or do not fit the model.
        ImportError: If they are of TensorFlow Datasets, and it is not installed.
    """
    if arguments.max_examples is not None and arguments.max_examples < 1:
        raise ValueError(
            f"Expected --max-examples to be 1 or more. Received: {arguments.max_examples}"
        )
    if source.startswith("tfds:"):
        x, y = _of_tfds(source, inputs, arguments.max_examples, part)
    elif Path(source).is_dir():
        x, y = _of_folder(Path(source), inputs, arguments.max_examples)
    elif not Path(source).exists():
        raise ValueError(
            "Expected a file of arrays or a folder of images. "
            f"Received: {source}, which does not exist"
        )
    else:
        x, y = _of_file(Path(source), inputs, arguments.max_examples, part)
    if labels and y is None:
        raise ValueError(
            f"Expected labels beside the examples. Received: {source}, which has no labels. An "
            f".npz file holds x_{part} and y_{part}, or x and y; a folder has a folder for each "
            "class."
        )
    return _scaled(x, arguments.scale), y


def _scaled(x: Any, scale: float) -> Any:
    if scale == 1:
        return x
    if isinstance(x, Mapping):
        return {name: _scaled(array, scale) for name, array in x.items()}
    return x.astype("float32") * np.float32(scale)


# -- Files ---------------------------------------------------------------------------------------


def load_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """The arrays of an .npz file, or the one of an .npy file, by name.

    Args:
        path: The file.
        names: The arrays to read; None for all.

    Raises:
        ValueError: If there is no such file, or it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"Expected a file of arrays. Received: {path}, which does not exist")
    try:
        content = np.load(path)
        if isinstance(content, np.ndarray):
            return {"x": content}
        with content as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {path} to be an .npz file of arrays. "
            f"Received: a file that cannot be read ({error})"
        ) from error


def _of_file(path: Path, inputs: Inputs, limit: int | None, part: str) -> tuple[Any, Any]:
    arrays = load_arrays(path)
    y = next((arrays[name] for name in (f"y_{part}", "y") if name in arrays), None)
    if len(inputs.names) > 1 and set(inputs.names) <= set(arrays):
        rows = len(arrays[inputs.names[0]])
        x = {name: _spread(arrays[name], limit) for name in inputs.names}
    elif len(inputs.names) > 1:
        raise ValueError(
            f"Expected {path} to hold an array for each of the inputs {', '.join(inputs.names)}. "
            f"Received: {', '.join(arrays) or 'no arrays'}"
        )
    else:
        found = arrays[_array_of_inputs(path, arrays, inputs, part)]
        x, rows = _spread(found, limit), len(found)
    if y is None or y.size == 0:
        return x, None
    if len(y) != rows:
        raise ValueError(
            f"Expected a label for each of {rows:,} examples. Received: {len(y):,} in {path}"
        )
    return x, _spread(y.reshape(-1) if y.size == len(y) else y, limit)


def _array_of_inputs(path: Path, arrays: Mapping[str, Any], inputs: Inputs, part: str) -> str:
    """The name of the array with the examples."""
    usual = [name for name in (*inputs.names, f"x_{part}", "x") if name in arrays]
    others = [name for name in arrays if not name.startswith("y")]
    if not usual and len(others) != 1:
        raise ValueError(
            f"Expected {path} to hold the examples as x_{part} or x, or one array for each of the "
            f"inputs {', '.join(inputs.names)}. Received: {', '.join(arrays) or 'no arrays'}"
        )
    name = (usual or others)[0]
    if not arrays[name].ndim:
        raise ValueError(f"Expected examples in {path}. Received: one number as {name}")
    return name


def _spread(array: Any, limit: int | None) -> Any:
    """At most so many rows, at even distances."""
    if limit is None or len(array) <= limit:
        return array
    return array[np.linspace(0, len(array), limit, endpoint=False).astype(int)]


# -- Images --------------------------------------------------------------------------------------


def _of_folder(folder: Path, inputs: Inputs, limit: int | None) -> tuple[Any, Any]:
    """The images of a folder. If folders of classes hold all of them, those are the labels."""
    from keras_alds._backend.images import read_image

    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
    if not paths:
        raise ValueError(
            f"Expected a folder of images ({', '.join(IMAGES)}). "
            f"Received: {folder}, which has no images"
        )
    classes = sorted({path.relative_to(folder).parts[0] for path in paths})
    in_folders = all(len(path.relative_to(folder).parts) > 1 for path in paths)
    chosen = [paths[i] for i in _spread(np.arange(len(paths)), limit)]
    channels = inputs.image[2]
    x = _stacked((read_image(path, channels) for path in chosen), inputs)
    if not in_folders:
        return x, None
    return x, np.array([classes.index(path.relative_to(folder).parts[0]) for path in chosen])


def _stacked(images: Iterable[Any], inputs: Inputs) -> Any:
    """Images of any size, in the size of the model's input."""
    from keras_alds._backend.images import resized_image

    height, width, _ = inputs.image
    found = [resized_image(image, height, width) for image in images]
    shapes = {image.shape for image in found}
    if len(shapes) > 1:
        raise ValueError(
            "Expected images of one size for a model without a size of its own. Received: images "
            f"of {len(shapes)} sizes, such as {' and '.join(map(str, sorted(shapes)[:2]))}"
        )
    return np.stack(found)


def _of_tfds(source: str, inputs: Inputs, limit: int | None, part: str) -> tuple[Any, Any]:
    _, name, *split = source.split(":", 2)
    tfds = imported("tensorflow_datasets", source, "tensorflow-datasets")
    try:
        data = tfds.load(name, split=split[0] if split else part, shuffle_files=False)
    except Exception as error:  # its own kinds, for unknown names and splits
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"Expected the name of a TensorFlow data set. Received: {source} "
            f"({type(error).__name__}: {reason})"
        ) from error
    rows = list(itertools.islice(tfds.as_numpy(data), limit))
    if not rows or "image" not in rows[0]:
        raise ValueError(
            f"Expected a data set of images. Received: {source} with "
            f"{', '.join(rows[0]) if rows else 'no examples'}"
        )
    channels = inputs.image[2]
    x = _stacked((_with_channels(row["image"], channels) for row in rows), inputs)
    return x, np.array([row["label"] for row in rows]) if "label" in rows[0] else None


def _with_channels(image: Any, channels: int) -> Any:
    """A grey image in as many channels as a model takes; others as they are."""
    return np.repeat(image, channels, -1) if image.shape[-1] == 1 else image
