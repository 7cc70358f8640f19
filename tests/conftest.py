"""What all tests share: Keras 3 and tf_keras, the real networks and images, seeds, quiet logs."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# `pytest -n` has a process for every core; more threads would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# Without oneDNN, which TensorFlow enables by default only on newer processors, the stock layers
# that the tests compare with do not run `channels_first`, and grouped ones have no gradient.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


#: In the names of files about what differs most between Keras 3 and tf_keras.
DIFFERENT = ("_backend/", "test_callbacks.py", "test_backups", "test_saving")
#: In the names of parameters that only one of the two has; the other skips the test.
IN_ONE = ("legacy", "GroupQueryAttention")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--everything",
        action="store_true",
        help="run tests marked `long` too, and every test in Keras 3 and in tf_keras",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only `--everything` runs; skips what is marked `data` where there is none."""
    if not (config.getoption("everything") or any("::" in name for name in config.args)):
        left_out = {item for item in items if item.get_closest_marker("long")}
        rest = [item for item in items if item not in left_out]
        left_out |= alternated([item for item in rest if not item.get_closest_marker("both")])
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    if DATA.is_dir():
        return
    skip = pytest.mark.skip(reason="needs the real networks and images of ../shared/data")
    for item in items:
        if item.get_closest_marker("data") or "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(skip)


def alternated(items: list[pytest.Item]) -> set[pytest.Item]:
    """What is left out of the tests that can run in both Kerases, so that each runs in one.

    The parameters of a test alternate, and so do the tests of a file without other parameters, in
    an order that has nothing to do with what they are. Tests without other parameters run in both
    where the Kerases differ most.
    """
    libraries = ("keras", "tf_keras")
    if not all(map(importlib.util.find_spec, libraries)):
        return set()
    groups: dict[str, dict[str, dict[str, pytest.Item]]] = {}
    for item in items:
        test, _, parameters = item.nodeid.partition("[")
        names = parameters.removesuffix("]").split("-")
        for library in libraries:
            if library in names:
                others = "-".join(name for name in names if name != library)
                file = test.partition("::")[0]
                group = test if others or any(name in file for name in DIFFERENT) else file
                by_library = groups.setdefault(group, {}).setdefault(f"{test}[{others}]", {})
                by_library[library] = item
    left_out = set()
    for group in groups.values():
        pairs = {
            name: pair
            for name, pair in group.items()
            if len(pair) == 2 and not any(only in name for only in IN_ONE)
        }
        if len(pairs) > 1:
            mixed = sorted(pairs, key=lambda name: zlib.crc32(name.encode()))
            left_out |= {pairs[name][libraries[i % 2]] for i, name in enumerate(mixed)}
    return left_out


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> Iterator[None]:
    """Hides what the imports make from the garbage collector: most tests take half of the time.

    No layer is among these 400,000 objects, so `live` does not have to look there either. Garbage
    is collected more rarely, and not at every conversion: another tenth of the time.
    """
    converter = "tensorflow.lite.python.lite"
    for name in ("keras", "tf_keras", converter, "keras_alds._backend.live"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(20_000, 20, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", lambda: 0)
        patch.setattr(sys.modules[converter], "gc", SimpleNamespace(collect=lambda: 0))
        yield
    gc.set_threshold(*before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real networks and images; tests that ask for it are marked `data`."""
    return DATA


@pytest.fixture(params=["keras", "tf_keras"])
def keras_module(request: pytest.FixtureRequest) -> ModuleType:
    """Keras 3 and then tf_keras, as modules."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return importlib.import_module(request.param)


# `zoo` is imported when it is used: TensorFlow's log lines would end the output of `pytest -n`.
KINDS_OF_MODELS = (
    *("functional", "sequential", "sequential_built_by_a_call", "nested"),
    *("shared", "wrapped", "temporal", "subclassed"),
)


@pytest.fixture(params=KINDS_OF_MODELS)
def model(request: pytest.FixtureRequest, keras_module: ModuleType) -> Any:
    """A model of every kind."""
    keras_module.utils.set_random_seed(0)
    zoo = importlib.import_module("zoo")
    assert tuple(zoo.MODELS) == KINDS_OF_MODELS
    return zoo.MODELS[request.param](keras_module)


@pytest.fixture(scope="session")
def parameters_of(request: pytest.FixtureRequest) -> Callable[[str], list[dict[str, Any]]]:
    """The parameters with which a test will run, by its name."""
    return lambda test: [
        item.callspec.params
        for item in request.session.items
        if getattr(item, "originalname", None) == test
    ]


@pytest.fixture
def small(keras_module: ModuleType) -> Any:
    """A small Functional model."""
    keras_module.utils.set_random_seed(0)
    return importlib.import_module("zoo").functional(keras_module)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seeds Python, NumPy and TensorFlow before every test (Keras 3 and tf_keras use these)."""
    keras = importlib.import_module("keras")
    keras.utils.set_random_seed(0)
    if "tf_keras" in sys.modules:  # what an earlier test has seeded would go on
        vars(importlib.import_module("tf_keras.src.backend")._SEED_GENERATOR).clear()
