"""The mathematics, in NumPy and SciPy: the choices of a kernel, and one choice for each layer.

- `slicing`: channel slices and fold schemes, kernels as matrices;
- `spectra`: singular values of all slices, and the factors of a choice;
- `errors`: what a rank loses;
- `choices`, `costs`: size, cost and error of each choice of a layer;
- `solvers`, `methods`: one choice for each layer within the budgets;
- `calibration`: the same with calibration data;
- `parallel`, `checks`: threads with bounded memory, checks of arguments.

Nothing here imports TensorFlow or Keras.
"""
