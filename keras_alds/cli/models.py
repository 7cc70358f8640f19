"""The model arguments that several commands share."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

#: The packages that can load a model.
LOADERS = ("keras", "tf_keras")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `read_model` reads."""
    parser.add_argument(
        "model", type=Path, help="a saved model: .keras, .h5 or a SavedModel folder of tf_keras"
    )
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Adds how to load models."""
    parser.add_argument(
        "--keras",
        choices=LOADERS,
        help="the loading package (default: keras, or tf_keras for what only that can load)",
    )
    parser.add_argument(
        "--custom",
        metavar="CODE",
        action="append",
        default=[],
        help="a Python file or module with the model's own classes; it is run. May be repeated",
    )


def read_model(arguments: argparse.Namespace, path: Path | None = None) -> Any:
    """The model that a command was given, or that in `path`, without its compile state.

    Keras's safe mode stays on: no code in the file runs.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from keras_alds import _backend

    path = arguments.model if path is None else path
    name = arguments.keras or _backend.saved_by(path)
    objects = {key: v for code in arguments.custom for key, v in vars(_run(code)).items()}
    own = {key: value for key, value in objects.items() if key[0] != "_" and callable(value)}
    return _backend.load_model(path, name, own)


def _run(code: str) -> ModuleType:
    """The module that a user named, imported."""
    try:
        if not code.endswith(".py"):
            sys.path.append(os.getcwd())
            return importlib.import_module(code)
        spec = importlib.util.spec_from_file_location(Path(code).stem, code)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            "Expected --custom to name a Python file or module that can be imported. "
            f"Received: {code} ({type(error).__name__}: {error})"
        ) from error
    return module
