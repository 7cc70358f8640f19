"""Everything between a Keras model and a plan.

- `inventory`: inspects a model: its layers, and those that are skipped, and why;
- `resources`: what a plan can limit: parameters and multiply–accumulates;
- `choices`: cost and error of every choice of a layer, with cached singular values;
- `selection`: the budgets, the allowed choices and the solution, as a plan;
- `matching`: pairs the layers of a model with the choices of a plan;
- `data`: checks calibration data and batches them;
- `observe`: accumulates the second moments of layer inputs in a running model;
- `calibration`: collects, caches, saves and loads calibration statistics;
- `storage`: keeps many tensors in bounded memory;
- `sequential`: compresses layers one by one, each on the outputs of those before;
- `factorize`: makes the factorized layer for one choice;
- `in_place`: factorizes the layers of a model in place;
- `optimizer`: converts optimizer state from kernels to factors;
- `rebuild`: rebuilds Functional and Sequential models with other layers;
- `expansion`: `expand`, which replaces factorized layers by stock layers;
- `ranges`: `equalize`, which balances the channels between encoder and decoder.
"""
