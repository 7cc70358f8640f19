"""Calibration: statistics of a layer's inputs, output errors, and factors that minimize them.

- `patches`: the unfolded inputs of a layer;
- `accumulators`, `moments`: their second moment;
- `whitening`: the output error at each rank;
- `held_out`: the same on other inputs, and the ridge for which it is smallest;
- `curves`: what an output error does to the outputs of the model;
- `refit`: the factors of a choice;
- `regression`: the kernel that fits changed inputs;
- `symmetric`, `semidefinite`: their linear algebra.
"""
