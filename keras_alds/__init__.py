"""keras_alds: optimal low-rank compression (ALDS) for trained Keras and TensorFlow models.

```python
small = keras_alds.compress(model, cr=0.5)  # a new model with half the parameters
model.fit(x, y, callbacks=[keras_alds.ALDSCompress(cr=0.5, at_epoch=80)])  # the same model
```

The layers here are those of Keras 3. Those of tf_keras are in `keras_alds.tf_keras`. Everything
else works with models of both.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import wrapt

from keras_alds._version import __version__

if TYPE_CHECKING:
    from keras_alds import litert, plots, tfmot
    from keras_alds.api import apply_plan, compress, recompose, select
    from keras_alds.callbacks import ALDSCompress
    from keras_alds.layers import FactorizedConv1D, FactorizedConv2D, FactorizedDense
    from keras_alds.models.calibration import CalibrationStats
    from keras_alds.models.expansion import expand
    from keras_alds.models.resources import count_macs
    from keras_alds.monitoring import RankMonitor
    from keras_alds.narrowing import NarrowedLayer, Narrowing, narrow, narrow_heads
    from keras_alds.plan import CompressionPlan, LayerChoice
    from keras_alds.refinement import Refinement, refine
    from keras_alds.reports import report
    from keras_alds.research.sweeping import Sweep, SweepRow, sweep
    from keras_alds.searching import SearchPoint, SearchResult, search
    from keras_alds.sensitivities import LayerSensitivity, Sensitivity, sensitivity
    from keras_alds.tfmot.conversion import to_tf_keras

#: Where the public names are. A name is imported when it is used: TensorFlow takes seconds to load.
_HOMES = {
    "ALDSCompress": "callbacks",
    "CalibrationStats": "models.calibration",
    "CompressionPlan": "plan",
    "FactorizedConv1D": "layers",
    "FactorizedConv2D": "layers",
    "FactorizedDense": "layers",
    "LayerChoice": "plan",
    "LayerSensitivity": "sensitivities",
    "NarrowedLayer": "narrowing",
    "Narrowing": "narrowing",
    "RankMonitor": "monitoring",
    "Refinement": "refinement",
    "SearchPoint": "searching",
    "SearchResult": "searching",
    "Sensitivity": "sensitivities",
    "Sweep": "research.sweeping",
    "SweepRow": "research.sweeping",
    "apply_plan": "api",
    "compress": "api",
    "count_macs": "models.resources",
    "expand": "models.expansion",
    "narrow": "narrowing",
    "narrow_heads": "narrowing",
    "recompose": "api",
    "refine": "refinement",
    "report": "reports",
    "search": "searching",
    "select": "api",
    "sensitivity": "sensitivities",
    "sweep": "research.sweeping",
    "to_tf_keras": "tfmot.conversion",
}
_MODULES = ("layers", "litert", "plots", "tf_keras", "tfmot")

__all__ = [
    "ALDSCompress",
    "CalibrationStats",
    "CompressionPlan",
    "FactorizedConv1D",
    "FactorizedConv2D",
    "FactorizedDense",
    "LayerChoice",
    "LayerSensitivity",
    "NarrowedLayer",
    "Narrowing",
    "RankMonitor",
    "Refinement",
    "SearchPoint",
    "SearchResult",
    "Sensitivity",
    "Sweep",
    "SweepRow",
    "__version__",
    "apply_plan",
    "compress",
    "count_macs",
    "expand",
    "litert",
    "narrow",
    "narrow_heads",
    "plots",
    "recompose",
    "refine",
    "report",
    "search",
    "select",
    "sensitivity",
    "sweep",
    "tfmot",
    "to_tf_keras",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"keras_alds.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"keras_alds.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


#: What registering layers needs. Each may be imported in the middle of the import of another one:
#: with `TF_USE_LEGACY_KERAS`, TensorFlow imports tf_keras, and hides it if that fails.
_NEEDED = ("tensorflow", "keras", "tf_keras", "keras_alds._backend", "keras_alds.kinds")
_imported: set[str] = set()


def _register_layers(module: Any) -> None:
    """Registers the factorized layers for what was imported, so that saved models load."""
    _imported.add(module.__name__)
    if any(sys.modules.get(name) is not None and name not in _imported for name in _NEEDED):
        return  # in the middle of an import: called again at its end
    for name, home in (("keras", "layers"), ("tf_keras", "tf_keras")):
        if name in _imported:
            importlib.import_module(f"keras_alds.{home}")


# Called at once for what is imported already, else when it is.
for _name in _NEEDED:
    wrapt.register_post_import_hook(_register_layers, _name)
