"""The model argument that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

#: The packages that can load a model.
LOADERS = ("keras", "tf_keras")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `read_model` reads."""
    parser.add_argument("model", type=Path, help="a saved model, .keras or .h5")
    parser.add_argument("--keras", choices=LOADERS, default=LOADERS[0], help="the loading package")


def read_model(arguments: argparse.Namespace) -> Any:
    """The model that a command was given, without its compile state."""
    from keras_alds import _backend

    return _backend.load_model(arguments.model, arguments.keras)
