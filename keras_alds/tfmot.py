"""TF-MOT beside ALDS: pruning, weight clustering and quantization-aware training.

Needs `pip install "keras_alds[tfmot]"`. Imported when it is used: `keras_alds.tfmot`.
"""

__all__: list[str] = []
