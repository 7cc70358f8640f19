"""Distribution strategies: replicas of a model, and the processes that train it together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from keras_alds._backend.layers import Model, Variable

Result = TypeVar("Result")

# TensorFlow remembers the shapes of every collective operation by its key, for the whole process.
# Every strategy counts keys from 100, so a second one that reduces gradients of other shapes fails.
# After a compression, a strategy goes on from the next multiple of this.
_KEYS = 1 << 20
_LARGEST_KEY = (1 << 31) - _KEYS
_last_keys = 0


def replica_count(model: Model) -> int:
    """The number of replicas of a model; one if it has no strategy."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return 1  # the one process that calls `fit` has all weights
    return strategy.num_replicas_in_sync


class Replicas:
    """The replicas of a model, in one process or several; one if it has no strategy.

    Args:
        model: A model, or a layer, which has no strategy of its own.

    Attributes:
        count: The number of replicas.
        workers: The number of processes that train the model under a
            `MultiWorkerMirroredStrategy`.
        worker: Which of them this is. The chief, which decides for all, is 0.
    """

    def __init__(self, model: Model) -> None:
        self._strategy: Any = getattr(model, "distribute_strategy", None)
        self._first = 0
        self.count, self.workers, self.worker = replica_count(model), 1, 0
        if isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy):
            mine = self._strategy.experimental_local_results(
                self._strategy.experimental_distribute_values_from_function(
                    lambda context: context.replica_id_in_sync_group
                )
            )
            self._first = min(map(int, mine))
            self.workers = self.count // len(mine)
            self.worker = self._first // len(mine)

    @property
    def name(self) -> str:
        """The class of the strategy."""
        return type(self._strategy).__name__

    def local(self, function: Callable[[], Result]) -> Result:
        """Calls a function that reads the weights of the first replica here, and no others.

        The variables that it makes are of this process alone. So one worker may call it while
        others wait. It runs in a thread of its own, where no strategy is in force.
        """
        if self.count == 1:
            return function()

        def run() -> Result:
            with tf.distribute.ReplicaContext(self._strategy, self._first):
                return function()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(run).result()

    def exchange(self, payload: bytes) -> list[bytes]:
        """Sends bytes to all workers; they all have to call it, and may send nothing.

        Returns:
            What each of them sent.
        """
        if self.workers == 1:
            return [payload]
        padded = payload + bytes(-len(payload) % 8)
        mine = np.concatenate([[len(payload)], np.frombuffer(padded, np.int64)])
        everything, found = self._gathered(mine), []
        while everything.size:
            length = int(everything[0])
            end = 1 - (-length // 8)
            found.append(everything[1:end].tobytes()[:length])
            everything = everything[end:]
        return found

    def _gathered(self, words: np.ndarray) -> np.ndarray:
        """The integers of all workers, one after the other."""
        strategy = self._strategy

        def of_replica(context: Any) -> Any:
            mine = int(context.replica_id_in_sync_group) == self._first
            return tf.constant(words if mine else words[:0], tf.int64)

        with strategy.scope():
            each = strategy.experimental_distribute_values_from_function(of_replica)
            return strategy.gather(each, axis=0).numpy()

    def mirrored(self, variables: list[Variable]) -> list[Variable]:
        """The variables that have one value on all replicas, not a part of it on each."""
        per_replica = tf.VariableSynchronization.ON_READ
        return [v for v in variables if getattr(v, "synchronization", None) != per_replica]

    def renew_keys(self) -> None:
        """Lets the replicas of this process reduce gradients of other shapes from now on."""
        global _last_keys
        keys = getattr(getattr(self._strategy, "extended", None), "_collective_keys", None)
        if keys is None or self.count == 1 or self.workers > 1:
            return
        made = [key for group in keys._instance_key_table.values() for key in group.values()]
        if not made:  # other reductions, such as `ReductionToOneDevice`
            return
        used = max(made)
        start = max(used, _last_keys) // _KEYS * _KEYS + _KEYS
        if start > _LARGEST_KEY:
            return
        _last_keys = start
        for group in keys._instance_key_table.values():
            group.update(dict.fromkeys(group, start))
