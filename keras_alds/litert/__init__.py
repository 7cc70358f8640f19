"""LiteRT (TensorFlow Lite) files: convert, check and measure them, and limit their latency.

Needs `pip install "keras_alds[litert]"`. `keras_alds.litert` is imported on first use.
"""

from keras_alds.litert.comparison import FileComparison, FileFigures, compare
from keras_alds.litert.conversion import convert
from keras_alds.litert.device import read_latency_log, write_latency_files
from keras_alds.litert.equalization import equalize
from keras_alds.litert.files import LiteRTFile, Operator, Tensor, read_file
from keras_alds.litert.latency import measure_latency
from keras_alds.litert.measure import Latency, benchmark
from keras_alds.litert.runs import check_file
from keras_alds.litert.table import LatencyTable

__all__ = [
    "FileComparison",
    "FileFigures",
    "Latency",
    "LatencyTable",
    "LiteRTFile",
    "Operator",
    "Tensor",
    "benchmark",
    "check_file",
    "compare",
    "convert",
    "equalize",
    "measure_latency",
    "read_file",
    "read_latency_log",
    "write_latency_files",
]
