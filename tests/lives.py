"""A training that is killed and started again: what runs in its processes."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

import keras_alds

EPOCHS, AT_EPOCH = 5, 2
#: Where a process can be killed.
PLACES = ("fit", "compression", "backup")


class Killer:
    """Counts the calls of functions in places, and kills the process at one of them.

    Args:
        place: The place to count calls in. "" counts in all.
        call: The call to be killed at, from 1; 0: none.
    """

    def __init__(self, place: str, call: int) -> None:
        self.place, self.call = place, call
        self.counts = dict.fromkeys(PLACES, 0)

    @contextlib.contextmanager
    def watch(self, place: str):
        def count(frame: Any, event: str, arg: Any) -> None:
            self.counts[place] += 1
            if self.counts[place] == self.call:
                os.kill(os.getpid(), signal.SIGKILL)

        if self.place and place != self.place:
            yield
            return
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            yield
        finally:
            sys.setprofile(before)


def live(name: str, folder: Path, place: str, call: int, batches: int | None) -> None:
    """Trains from the start, or from the backup that a killed process left in `folder`.

    Args:
        name: `"keras"` or `"tf_keras"`.
        folder: Of the backup, and of what the training returns at its end.
        place: Where the process is killed, one of `PLACES`; or "" to count calls everywhere.
        call: At which call there, from 1; 0: nowhere.
        batches: After how many batches backups are written, or None: after each epoch.
    """
    K = importlib.import_module(name)
    killer = Killer(place, call)

    class Backup(K.callbacks.BackupAndRestore):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            with killer.watch("backup"):
                super().on_epoch_end(*args, **kwargs)

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            with killer.watch("backup"):
                super().on_train_batch_end(*args, **kwargs)

    class Compress(keras_alds.ALDSCompress):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            with killer.watch("compression"):
                super().on_epoch_begin(epoch, logs)

    K.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6, 6, 4)).astype("float32")
    y = (x[:, 0] @ rng.standard_normal((4, 3))).mean(1)
    layers = [K.layers.Conv2D(16, 3, activation="relu"), K.layers.Flatten(), K.layers.Dense(3)]
    model = K.Sequential([K.Input((6, 6, 4)), *layers])
    model.compile(K.optimizers.Adam(0.01), "mse", run_eagerly=True)
    compress = Compress(0.3, at_epoch=AT_EPOCH, target="size", verbose=0)
    backup = Backup(str(folder / "backup"), save_freq=batches or "epoch")
    with killer.watch("fit"):
        options = {"epochs": EPOCHS, "batch_size": 16, "shuffle": False, "verbose": 0}
        model.fit(x, y, callbacks=[backup, compress], **options)
    compress.plan.save(folder / "plan.json")
    np.savez(
        folder / "end.npz",
        *model.get_weights(),
        loss=model.evaluate(x, y, verbose=0),
        counts=[killer.counts[place] for place in PLACES],
    )
