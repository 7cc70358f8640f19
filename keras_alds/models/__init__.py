"""Whole models: inspection, choices for the layers, factorization in place, expansion.

The modules, in the order of their use:

- `inventory`: the layers of a model, and why some are skipped;
- `resources`: what a plan can limit, parameters and MACs;
- `data`, `observe`, `storage`, `calibration`: calibration data, and the moments of layer inputs;
- `program`, `probes`, `outputs`, `curves`: what other kernels do to the outputs of a model;
- `choices`, `selection`: the choices of each layer, the budgets, and the plan;
- `trials`, `exchange`, `moving_statistics`, `best`: several plans, and the best of them;
- `matching`, `factorize`, `sequential`, `fit`: from a plan to the factors of each layer;
- `in_place`, `optimizer`: factorization of the layers in place, with the optimizer state;
- `rebuild`, `expansion`: afterwards, stock layers;
- `ranges`, `merging`: before int8, equalized channels and merged normalizations.
"""
