"""Whole models: inspection, choices for the layers, factorization in place, expansion.

The modules, in the order of their use:

- `inventory`: the layers of a model, and why some are skipped;
- `resources`: what a plan can limit, parameters and MACs;
- `data`, `observe`, `storage`, `calibration`: calibration data, and the moments of layer inputs;
- `choices`, `selection`: the choices of each layer, the budgets, and the plan;
- `matching`, `factorize`, `sequential`: from a plan to the factors of each layer;
- `in_place`, `optimizer`: factorization of the layers in place, with the optimizer state;
- `rebuild`, `expansion`, `ranges`: afterwards, stock layers and equalized channels.
"""
