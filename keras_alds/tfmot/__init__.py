"""TF-MOT beside ALDS: pruning, weight clustering and quantization-aware training.

Needs `pip install "keras_alds[tfmot]"`. Imported when it is used: `keras_alds.tfmot`.
"""

from keras_alds.tfmot.aware import quantize_aware_training
from keras_alds.tfmot.wrapping import cluster_weights, prune_low_magnitude

__all__ = ["cluster_weights", "prune_low_magnitude", "quantize_aware_training"]
