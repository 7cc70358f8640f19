"""What is tested here works through what is tested with Keras 3 and tf_keras elsewhere."""

from __future__ import annotations

from types import ModuleType

import keras
import pytest


@pytest.fixture
def keras_module() -> ModuleType:
    return keras
