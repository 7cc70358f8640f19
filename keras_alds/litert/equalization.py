"""`equalize`: the same range for all channels between encoder and decoder, before int8."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress

from keras_alds import _backend
from keras_alds.models import ranges
from keras_alds.models.data import Examples, with_progress
from keras_alds.models.inventory import has_weights


def equalize(
    model: Any,
    representative_data: Any = None,
    *,
    max_examples: int | None = 256,
    verbose: int = 1,
) -> None:
    """Gives the channels between encoder and decoder the same range, **in place**.

    Between the two nothing is nonlinear: every rank's encoder weights are multiplied by some
    s > 0 and its decoder weights divided by it, and outputs stay the same up to float rounding. In
    int8 one scale serves all these channels. Where one is much larger than the others, these keep
    few of its 255 steps, and beyond some thousand times the file does not run in XNNPACK.

    `convert(quantize="int8")` does this by itself, on the way, and leaves the model as it was.
    Call this before quantization-aware training, or before a converter of your own.

    It takes factorized layers and, in Functional and Sequential models, the pairs that `expand`
    writes out (a linear layer whose output goes to one pointwise layer alone), not those inside
    wrappers such as `TimeDistributed`.

    Args:
        model: A built model of either Keras.
        representative_data: Unlabelled examples, as for `convert`: the largest absolute values of
            all channels of a layer on them become equal. Defaults to None: encoder and decoder
            weights of every rank get the same norm.
        max_examples: As for `convert`. Defaults to 256.
        verbose: 0 for silence, else a progress bar is shown on a terminal. Defaults to 1.

    Raises:
        ValueError: If `model` is no built model, or the data do not fit it or hold fewer than 8
            examples; the model is then as it was.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    keras_alds.litert.equalize(small, x, verbose=0)
    ```
    """
    backend = _backend.backend_of(model)
    if not backend.is_model(model) or not has_weights(model):
        raise ValueError(
            f"Expected `model` to be a built `{backend.name}.Model`. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if representative_data is None:
        ranges.equalize(model)
        return
    examples = Examples(model, representative_data, max_examples, "representative_data")
    with Progress(transient=True, disable=not verbose) as progress:
        batches = with_progress(examples, progress, "equalization")
        ranges.equalize(model, (inputs for inputs, _ in batches))
