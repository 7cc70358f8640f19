"""What several processes that train one model do together: the chief decides, all do the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from keras_alds import _backend
from keras_alds._backend.strategies import Replicas
from keras_alds.models.factorize import Replacement, rebuilt
from keras_alds.models.fit import factorize_with_bias
from keras_alds.models.matching import Pairs
from keras_alds.plan import CompressionPlan

Result = TypeVar("Result")

# Bytes of a checksum, and the beginning of what a chief sends that has failed.
_CHECKSUM, _FAILED = 16, b"failed: "


def check_refinable(model: Any) -> None:
    """Raises a ValueError if a model has several replicas, which cannot be refined together."""
    replicas = Replicas(model)
    if replicas.count > 1:
        raise ValueError(
            "Expected refine=False for a model with several replicas. Received: a model with "
            f"{replicas.count} replicas, under {replicas.name}. Remedy: call `refine` after the "
            "training, in one process."
        )


def check_alike(replicas: Replicas, what: str, mine: str, remedy: str) -> None:
    """Raises a ValueError, on every worker, if a text differs between workers.

    Args:
        replicas: The model's replicas.
        what: What the text is, for the error.
        mine: The text on this worker.
        remedy: What to do.
    """
    texts = [text.decode() for text in replicas.exchange(mine.encode())]
    for worker, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"Expected {what} to be the same on every worker. Received: {texts[0]} on the "
                f"chief, {text} on worker {worker}. {remedy}"
            )


def verdict_of_chief(replicas: Replicas, mine: bool) -> bool:
    """What the chief finds, which another worker might round differently."""
    return bool(replicas.exchange(b"yes" if mine else b"no")[0] == b"yes")


def check_plans(replicas: Replicas, plan: CompressionPlan) -> None:
    """Raises a ValueError, on every worker, if they have different plans."""
    if replicas.workers > 1:
        checksum = hashlib.sha256(_written(plan)).hexdigest()[: 2 * _CHECKSUM]
        text = f"a plan of cr={plan.cr:.4f} with the checksum {checksum}"
        check_alike(replicas, "the plan", text, "Load the same file on every worker.")


def check_weights(replicas: Replicas, model: Any) -> None:
    """Raises a ValueError, on every worker, if weights or optimizer differ between workers.

    The optimizer's `iterations` are among them, so all workers are at the same step.
    """
    if replicas.workers == 1:
        return
    variables = _variables(replicas, model)
    everywhere = _checksums(replicas, model, variables)
    for worker, theirs in enumerate(everywhere):
        differing = [n for n, checksum in enumerate(theirs) if checksum != everywhere[0][n]]
        if differing:
            raise ValueError(
                "Expected the same weights and optimizer state on every worker. Received: "
                f"'{variables[differing[0]].name}' on worker {worker}, which differs from the "
                f"chief's, as do {len(differing)} of {len(variables)} variables. Load the same "
                "weights on every worker."
            )


def plan_of_chief(
    replicas: Replicas,
    choose: Callable[[], Result],
    plan_of: Callable[[Result], CompressionPlan],
    received: Callable[[CompressionPlan], Result],
) -> Result:
    """What the chief chooses; on other workers what follows from its plan.

    Args:
        replicas: The model's replicas.
        choose: Chooses. Only the chief calls it.
        plan_of: The plan in what it has chosen.
        received: Makes of the plan what the others need.

    Raises:
        RuntimeError: On the other workers, if the chief fails.
    """

    def act() -> tuple[Result, bytes]:
        chosen = choose()
        return chosen, _written(plan_of(chosen))

    chosen, plan = _by_chief(replicas, act)
    return received(CompressionPlan.from_dict(json.loads(plan))) if chosen is None else chosen


def _by_chief(
    replicas: Replicas, act: Callable[[], tuple[Result, bytes]]
) -> tuple[Result | None, bytes]:
    """What only the chief does: its result, None on other workers, and the bytes to send."""
    result: Result | None = None
    answer = b""
    try:
        if replicas.worker == 0:
            result, answer = replicas.local(act)
    except Exception as error:  # the others would wait
        replicas.exchange(_FAILED + str(error).encode())
        raise
    answer = replicas.exchange(answer)[0]
    if answer.startswith(_FAILED):
        reason = answer.removeprefix(_FAILED).decode()
        raise RuntimeError(f"Expected the chief to compress the model. Received: {reason}")
    return result, answer


def made_together(
    replicas: Replicas,
    make: Callable[[], list[Replacement]],
    pairs: Pairs,
    plan: CompressionPlan,
) -> list[Replacement]:
    """The factorized layers of a plan, on all replicas.

    Only the chief makes the factors. On other workers they are 0 until `follow_chief` is called.

    Args:
        replicas: The model's replicas, several.
        make: Makes the factorized layers for one replica.
        pairs: The layers to factorize, with their choices in the plan.
        plan: The plan.

    Raises:
        RuntimeError: On the other workers, if the chief fails.
    """
    backend = _backend.backend_of(pairs[0][0].layer)
    made, _ = _by_chief(replicas, lambda: (make(), b""))
    each: Sequence[Replacement | None] = [None] * len(pairs) if made is None else made
    with_bias = factorize_with_bias(plan.method) is not None
    return [
        rebuilt(backend, record, choice, one, with_bias=with_bias)
        for (record, choice), one in zip(pairs, each, strict=True)
    ]


def follow_chief(replicas: Replicas, model: Any) -> None:
    """Gives every worker the chief's weights and optimizer state, bit for bit."""
    if replicas.workers == 1:
        return
    variables = _variables(replicas, model)
    everywhere = _checksums(replicas, model, variables)
    own = [v for v, *found in zip(variables, *everywhere, strict=True) if len(set(found)) > 1]
    values = [_backend.backend_of(model).value(v) for v in own]
    chief = replicas.worker == 0
    sent = replicas.exchange(b"".join(value.tobytes() for value in values) if chief else b"")[0]
    start = 0
    for variable, value in [] if chief else zip(own, values, strict=True):
        theirs = np.frombuffer(sent, value.dtype, value.size, start)
        variable.assign(theirs.reshape(value.shape))
        start += value.nbytes


def _written(plan: CompressionPlan) -> bytes:
    return json.dumps(plan.to_dict()).encode()


def _variables(replicas: Replicas, model: Any) -> list[Any]:
    """The variables of a model and its optimizers that have one value on all replicas."""
    found = {id(v): v for v in model.variables if hasattr(v, "shape")}
    for optimizer in _backend.backend_of(model).optimizers(model):
        state = optimizer.variables
        found.update((id(v), v) for v in (state() if callable(state) else state))
    return replicas.mirrored(list(found.values()))


def _checksums(replicas: Replicas, model: Any, variables: Sequence[Any]) -> list[list[bytes]]:
    """The checksum of every variable, on every worker."""
    backend = _backend.backend_of(model)
    mine = b"".join(
        hashlib.sha256(backend.value(v).tobytes()).digest()[:_CHECKSUM] for v in variables
    )
    return [
        [sent[at : at + _CHECKSUM] for at in range(0, len(sent), _CHECKSUM)]
        for sent in replicas.exchange(mine)
    ]
