"""The numerical core: NumPy and SciPy only, no TensorFlow, no Keras."""
