"""Whole models: inspect one, choose for its layers, factorize them in place, expand it.

In the order in which a model passes through:

- `inventory`: the layers of a model, and why some are skipped;
- `resources`: what a plan can limit, parameters and MACs;
- `data`, `observe`, `storage`, `calibration`: calibration data, and what the layers see of it;
- `choices`, `selection`: the choices of each layer, the budgets, and the plan;
- `matching`, `factorize`, `sequential`: from a plan to the factors of each layer;
- `in_place`, `optimizer`: layers become factorized ones, optimizer state follows;
- `rebuild`, `expansion`, `ranges`: afterwards, stock layers and balanced channels.
"""
