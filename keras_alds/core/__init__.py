"""The numerical core, in NumPy and SciPy: from a kernel to its choices, and one choice a layer.

`slicing` reads a kernel as channel slices, `spectra` decomposes these, `errors` says what a rank
loses, `choices` and `costs` make a layer's table of it, `solvers` and `methods` choose among the
layers. `calibration` does the same for what the layers see. Nothing here knows TensorFlow or Keras.
"""
