"""TF-MOT beside ALDS: pruning, weight clustering and quantization-aware training.

Needs `pip install "keras_alds[tfmot]"`. Imported when it is used: `keras_alds.tfmot`.
"""

from keras_alds.litert.aware import quantize_aware_training

__all__ = ["quantize_aware_training"]
