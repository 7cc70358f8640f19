"""Pictures of plans, models and results.

Every function draws one picture on Axes of matplotlib and returns them, as seaborn's do:

```python
plan = keras_alds.select(model, cr=0.5)
keras_alds.plots.costs(plan).figure.savefig("costs.png")
```

Without `ax`, the Axes are those of a new figure, which pyplot does not keep. A notebook shows them
if they are the last line of a cell. With `ax`, the function draws on yours, in any style:

```python
from matplotlib import pyplot as plt

with plt.style.context("dark_background"):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    keras_alds.plots.ranks(plan, ax=axes[0])
    keras_alds.plots.singular_values(model, ax=axes[1])
plt.close(figure)
```

matplotlib is optional: `pip install "keras_alds[plots]"`. The pictures are in docs/gallery.md.
"""

from keras_alds.plots.of_models import output_errors, singular_values, size_error
from keras_alds.plots.of_plans import costs, ranks
from keras_alds.plots.of_results import rank_history, scores, sensitivity

__all__ = [
    "costs",
    "output_errors",
    "rank_history",
    "ranks",
    "scores",
    "sensitivity",
    "singular_values",
    "size_error",
]
