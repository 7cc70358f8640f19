"""LiteRT (TensorFlow Lite): files that run, and what they cost where they run.

Needs `pip install "keras_alds[litert]"`. Imported when it is used: `keras_alds.litert`.
"""

from keras_alds.litert.convert import convert
from keras_alds.litert.equalize import equalize
from keras_alds.litert.files import LiteRTFile, Operator, Tensor, read_file
from keras_alds.litert.runs import check_runs

__all__ = ["LiteRTFile", "Operator", "Tensor", "check_runs", "convert", "equalize", "read_file"]
