"""TF-MOT with compressed models: prune, cluster, train for int8; Keras 3 models in tf_keras.

Needs `pip install "keras_alds[tfmot]"`. `keras_alds.tfmot` is imported when it is used.
"""

from keras_alds.tfmot.aware import quantize_aware_training
from keras_alds.tfmot.wrapping import cluster_weights, prune_low_magnitude

__all__ = ["cluster_weights", "prune_low_magnitude", "quantize_aware_training"]
