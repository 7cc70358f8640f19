"""What `BackupAndRestore` of Keras 3 and tf_keras keeps on disk."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from typing import Any

import h5py
import tensorflow as tf

from keras_alds._backend.layers import Model
from keras_alds._backend.training import Training, forget_children

#: Names of weights and their shapes.
Shapes = dict[str, tuple[int, ...]]


class Backups(Training):
    """The part of `Backend` that reads the backups of `BackupAndRestore`."""

    def is_backup(self, callback: Any) -> bool:
        """Whether a callback is a `BackupAndRestore`."""
        return isinstance(callback, self.keras.callbacks.BackupAndRestore)

    def backup_folder(self, callback: Any) -> str:
        """The folder that holds the backup, and that Keras deletes with it."""
        raise NotImplementedError

    def backed_up(self, callback: Any) -> Shapes | None:
        """Names and shapes of the model's weights in a backup; None if there is none.

        Raises:
            ValueError: If the backup is incomplete.
        """
        raise NotImplementedError

    def to_back_up(self, model: Model) -> Shapes:
        """Names and shapes of the weights that a backup of `model` would hold now.

        The model is saved in a temporary folder to find out.
        """
        with tempfile.TemporaryDirectory() as folder:
            return _of_model(self._saved(model, folder))

    def _saved(self, model: Model, folder: str) -> Shapes:
        raise NotImplementedError

    def saves_files(self, model: Model) -> bool:
        """Whether this process writes the backups; of several workers, one does."""
        return True

    def make_backups_safe(self, callback: Any) -> None:
        """Lets a backup survive the end of the process at any moment while it is written."""

    def note_epoch(self, callback: Any, epoch: int) -> None:
        """Tells a callback the index of the epoch that begins."""


class Keras3Backups(Backups):
    """The implementation for Keras 3, which writes weights and epoch over the old ones.

    `make_backups_safe` lets it write both beside them, first the weights, and then move them. What
    a process left there is moved at the restart if it is complete.
    """

    def backup_folder(self, callback: Any) -> str:
        return os.fspath(callback.backup_dir)

    def backed_up(self, callback: Any) -> Shapes | None:
        paths = [path for path in _weights(callback) if tf.io.gfile.exists(path)]
        for path in paths:  # the second if the first is broken
            with contextlib.suppress(OSError):
                return _of_model(_datasets(path))
        if not paths:
            return None
        raise ValueError(
            "Expected a complete backup. Received: the incomplete file "
            f"{paths[0]!r}, whose writing was interrupted. To start over, delete the folder."
        )

    def _saved(self, model: Model, folder: str) -> Shapes:
        path = os.path.join(folder, "model.weights.h5")
        model.save_weights(path)
        return _datasets(path)

    def make_backups_safe(self, callback: Any) -> None:
        names = ("_weights_path", "_training_metadata_path")
        if "://" in self.backup_folder(callback) or not all(hasattr(callback, n) for n in names):
            return  # what is written to a bucket appears when it is complete
        save = functools.partial(type(callback)._save_model, callback)
        final = {name: getattr(callback, name) for name in names}
        new = {name: _beside(path) for name, path in final.items()}

        def finish() -> None:
            for name in names:
                if os.path.exists(new[name]):
                    os.replace(new[name], final[name])

        def save_safely(*args: Any, **kwargs: Any) -> None:
            vars(callback).update(new)
            try:
                save(*args, **kwargs)
            finally:
                vars(callback).update(final)
            if getattr(callback, "double_checkpoint", False):
                for path in filter(os.path.exists, final.values()):
                    os.replace(path, f"{path}.bkp")
            finish()

        if _is_json(new["_training_metadata_path"]):  # written last, so both are complete
            finish()
        with contextlib.suppress(FileNotFoundError):
            os.remove(new["_weights_path"])
        callback._save_model = save_safely

    def note_epoch(self, callback: Any, epoch: int) -> None:
        # Otherwise a training that was resumed writes epoch 0 until its first epoch ends.
        callback._current_epoch = epoch


class TfKerasBackups(Backups):
    """The implementation for tf_keras, whose backups are complete checkpoints at any moment."""

    def backup_folder(self, callback: Any) -> str:
        return os.path.join(callback.backup_dir, "chief")

    def saves_files(self, model: Model) -> bool:
        return bool(model.distribute_strategy.extended.should_checkpoint)

    def backed_up(self, callback: Any) -> Shapes | None:
        latest = tf.train.latest_checkpoint(self.backup_folder(callback))
        return None if latest is None else _of_model(_variables(latest))

    def _saved(self, model: Model, folder: str) -> Shapes:
        path = tf.train.Checkpoint(model=model).write(os.path.join(folder, "model"))
        for optimizer in self.optimizers(model):
            forget_children(optimizer)
        return _variables(path)


def exists(path: str) -> bool:
    """Whether there is a file, which may be in a bucket."""
    return bool(tf.io.gfile.exists(path))


def read_text(path: str) -> str | None:
    """The content of a file, which may be in a bucket; None if there is none."""
    if not exists(path):
        return None
    with tf.io.gfile.GFile(path) as file:
        return str(file.read())


def write_text(path: str, text: str) -> None:
    """Writes a file at once, so that others see the old content or the new one."""
    tf.io.gfile.makedirs(os.path.dirname(path))
    with tf.io.gfile.GFile(f"{path}.new", "w") as file:
        file.write(text)
    tf.io.gfile.rename(f"{path}.new", path, overwrite=True)


def save_weights(model: Model, path: str, *, write: bool) -> None:
    """Writes the weights of a model at once, also into a bucket.

    Args:
        model: The model.
        path: The file.
        write: False only reads the weights, which several workers have to do together.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "model.weights.h5")
        model.save_weights(local)
        if write:
            tf.io.gfile.makedirs(os.path.dirname(path))
            tf.io.gfile.copy(local, f"{path}.new", overwrite=True)
            tf.io.gfile.rename(f"{path}.new", path, overwrite=True)


def load_weights(model: Model, path: str) -> None:
    """Reads weights that `save_weights` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "model.weights.h5")
        tf.io.gfile.copy(path, local)
        model.load_weights(local)


def _of_model(shapes: Shapes) -> Shapes:
    """Without optimizers, metrics and counters, which may not have been created yet."""
    others = ("_CHECKPOINTABLE", "ckpt_saved", "save_counter", "train_counter")
    return {
        name: shape
        for name, shape in shapes.items()
        if not name.startswith(others)
        and "/keras_api/metrics/" not in name
        and not any(map(_is_optimizer, name.split("/")))
    }


def _is_optimizer(name: str) -> bool:
    """Whether a step of a path names an optimizer or its state, such as `gen_optimizer`."""
    return name == ".OPTIMIZER_SLOT" or bool({"optimizer", "optimizers"} & {*name.split("_")})


def _weights(callback: Any) -> list[str]:
    latest = os.path.join(callback.backup_dir, "latest.weights.h5")
    return [latest, f"{latest}.bkp"]


def _beside(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f"new_{name}")


def _is_json(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _datasets(path: str) -> Shapes:
    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = tuple(item.shape)

    with tf.io.gfile.GFile(path, "rb") as stored, h5py.File(stored) as file:
        file.visititems(visit)
    return found


def _variables(checkpoint: str) -> Shapes:
    return {name: tuple(shape) for name, shape in tf.train.list_variables(checkpoint)}
