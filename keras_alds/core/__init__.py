"""The mathematics, in NumPy and SciPy: the choices for a kernel, and one choice per layer.

- `slicing`: channel slices and fold schemes, kernels as matrices;
- `spectra`: singular values of all slices, and the factors for a choice;
- `errors`: the error at each rank;
- `choices`, `costs`: size, cost and error of each choice for a layer;
- `solvers`, `methods`: one choice per layer within the budgets;
- `calibration`: the same with calibration data;
- `parallel`, `checks`: threads with bounded memory, and argument checks.

Nothing here imports TensorFlow or Keras.
"""
