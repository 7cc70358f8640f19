"""TF-MOT combined with ALDS: pruning, weight clustering and quantization-aware training.

Requires `pip install "keras_alds[tfmot]"`. `keras_alds.tfmot` is imported on first use.
"""

from keras_alds.tfmot.aware import quantize_aware_training
from keras_alds.tfmot.wrapping import cluster_weights, prune_low_magnitude

__all__ = ["cluster_weights", "prune_low_magnitude", "quantize_aware_training"]
