"""keras_alds: optimal low-rank compression (ALDS) for trained Keras and TensorFlow models.

```python
small = keras_alds.compress(model, cr=0.5)  # a new model with half the parameters
model.fit(x, y, callbacks=[keras_alds.ALDSCompress(cr=0.5, at_epoch=80)])  # the same model
```

The layers here are those of Keras 3; for tf_keras they are in `keras_alds.tf_keras`. Everything
else works with models of both.
"""

import contextlib
import importlib
import typing

from keras_alds._version import __version__
from keras_alds.callbacks import ALDSCompress
from keras_alds.compress import compress, select
from keras_alds.layers import FactorizedConv1D, FactorizedConv2D, FactorizedDense
from keras_alds.plan import CompressionPlan, LayerChoice
from keras_alds.tables import report
from keras_alds.models.expansion import expand
from keras_alds.models.in_place import apply_plan
from keras_alds.models.inspect import count_macs
from keras_alds.models.observe import CalibrationStats

with contextlib.suppress(ImportError):  # tf_keras is optional; this registers its layers
    from keras_alds import tf_keras as tf_keras

if typing.TYPE_CHECKING:
    from keras_alds import litert, tfmot
    from keras_alds.research.sweeping import Sweep, SweepRow, sweep
    from keras_alds.tfmot.conversion import to_tf_keras

# What needs more than the rest is imported when it is asked for.
_LAZY = {
    **dict.fromkeys(("Sweep", "SweepRow", "sweep"), "keras_alds.research.sweeping"),
    "to_tf_keras": "keras_alds.tfmot.conversion",
}
_LAZY_MODULES = ("litert", "tfmot")

__all__ = [
    "ALDSCompress",
    "CalibrationStats",
    "CompressionPlan",
    "FactorizedConv1D",
    "FactorizedConv2D",
    "FactorizedDense",
    "LayerChoice",
    "Sweep",
    "SweepRow",
    "__version__",
    "apply_plan",
    "compress",
    "count_macs",
    "expand",
    "litert",
    "report",
    "select",
    "sweep",
    "tfmot",
    "to_tf_keras",
]


def __getattr__(name: str) -> typing.Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"keras_alds.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
