"""What the layers see of calibration data, and the factors that keep their outputs best.

`patches` unfolds a layer's inputs, `accumulators` and `moments` hold their second moments,
`whitening` says what the outputs lose at every rank, `refit` makes the factors of a choice, and
`regression` fits a kernel to inputs that have changed. `symmetric` and `semidefinite` are their
linear algebra.
"""
