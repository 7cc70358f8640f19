"""Calibration data: what a layer sees, what its outputs lose, and the factors that keep them.

- `patches`: the unfolded inputs of a layer;
- `accumulators`, `moments`: their second moment;
- `whitening`: what the outputs lose at each rank;
- `refit`: the factors of a choice;
- `regression`: the kernel that fits inputs which have changed;
- `symmetric`, `semidefinite`: their linear algebra.
"""
