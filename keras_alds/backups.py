"""Resumes a training from the backup of `BackupAndRestore`, across compressions.

A backup holds weights, and fits only a model of the same structure. So the plans of all
compressions are kept beside it, each with the names and shapes of the weights that the model had
afterwards. When training starts again, the weights in the backup say which plans to apply.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras_alds import _backend
from keras_alds._backend.backups import (
    Shapes,
    exists,
    load_weights,
    read_text,
    save_weights,
    write_text,
)
from keras_alds.models.in_place import apply
from keras_alds.models.inventory import has_weights
from keras_alds.models.recompose import Request, inspected, recomposed, to_recompose
from keras_alds.plan import CompressionPlan

FORMAT = "keras_alds.backup"
VERSION = 1


class Part(NamedTuple):
    """A model or a part of one that a callback compresses, and what is asked of it."""

    model: Any
    request: Request


@dataclasses.dataclass(frozen=True)
class Compression:
    """A compression that took place.

    Attributes:
        part: The name of the submodel; "" for the whole model.
        plan: Its plan.
        weights: The names and shapes of all weights of the trained model from then on.
    """

    part: str
    plan: CompressionPlan
    weights: Shapes


class Backup:
    """The backup that a `BackupAndRestore` of `fit` reads and writes, with the plans beside it."""

    def __init__(self, model: Any, callback: Any) -> None:
        self.model = model
        self.callback = callback
        self._backend = _backend.backend_of(model)
        self._path = os.path.join(self._backend.backup_folder(callback), "keras_alds.json")
        self._past: list[Compression] = []

    def resume(self, parts: Mapping[str, Part]) -> list[Compression]:
        """Gives the model the structure that the backup has. Keras then restores its weights.

        Args:
            parts: What is compressed in this training, by the names of the submodels.

        Returns:
            The compressions that have taken place.

        Raises:
            ValueError: If the backup cannot be resumed. A dense model is unchanged.
        """
        self._backend.make_backups_safe(self.callback)
        found = self._backend.backed_up(self.callback)
        stages = self._read() if found is not None else []
        last = max((i for i, s in enumerate(stages) if _holds(found, s.weights)), default=-1)
        past = stages[: last + 1]
        if found is not None:
            self._restore(found, past, parts)
        if self._is_writer and read_text(self._path) is not None:
            self._write(past)  # later compressions are done again
        self._past = past
        return past

    def add(self, part: str, plan: CompressionPlan, teacher: Any | None = None) -> None:
        """Keeps the plan of a compression that has just taken place, and the weights before it.

        Args:
            part: The name of the submodel.
            plan: The plan.
            teacher: The part as it was before, if it is to teach.
        """
        weights = self._backend.to_back_up(self.model)  # which all workers do together
        past = self._read() if self._is_writer else []
        if teacher is not None:
            save_weights(teacher, self._teacher(len(past)), write=self._is_writer)
        if self._is_writer:
            self._write([*past, Compression(part, plan, weights)])

    def teacher(self, name: str, part: Part, copied: Callable[[], Any]) -> Any | None:
        """The part as it was before the first compression for which `add` has kept it.

        The weights of the part are lost. Keras restores them later.

        Args:
            name: The name of the submodel.
            part: The submodel, compressed as in the backup.
            copied: Copies it.
        """
        past = [(i, stage.plan) for i, stage in enumerate(self._past) if stage.part == name]
        kept = [n for n, (number, _) in enumerate(past) if exists(self._teacher(number))]
        if not kept:
            return None
        first = kept[0]
        self._change(part, past[first - 1][1] if first else None)
        teacher = copied()
        load_weights(teacher, self._teacher(past[first][0]))
        self._change(part, past[-1][1])
        return teacher

    def _teacher(self, number: int) -> str:
        return f"{self._path.removesuffix('.json')}_teacher{number}.weights.h5"

    def note_epoch(self, epoch: int) -> None:
        """Tells `BackupAndRestore` which epoch begins."""
        self._backend.note_epoch(self.callback, epoch)

    @property
    def _is_writer(self) -> bool:
        return self._backend.saves_files(self.model)

    def _restore(self, found: Shapes, past: list[Compression], parts: Mapping[str, Part]) -> None:
        if not (self.model.built or has_weights(self.model)):
            if past:
                raise ValueError(
                    "Expected a model that is built before `fit`, to restore the backup of a "
                    f"compressed model. Received: '{self.model.name}', which is not built, and "
                    f"backup_dir={self._folder!r}. Call the model on a batch."
                )
            return
        missing = _missing(found, self._backend.to_back_up(self.model))
        if missing is None:
            return
        if unknown := [stage.part for stage in past if stage.part not in parts]:
            raise ValueError(
                "Expected an ALDSCompress for every part of the model that is compressed in the "
                f"backup. Received: none for submodel={unknown[0]!r}, and backup_dir="
                f"{self._folder!r}"
            )
        if not past and not self._was_dense(found, parts):
            raise ValueError(self._does_not_fit(missing))
        before = self.model.get_weights()
        compressed = [part for part in parts.values() if self._factorized(part)]
        try:
            for part in compressed:
                self._change(part, None)
            for stage in past:
                self._change(parts[stage.part], stage.plan)
            missing = _missing(found, self._backend.to_back_up(self.model))
            if missing is not None:
                raise ValueError(self._does_not_fit(missing))
        except BaseException:
            if not compressed:
                for part in parts.values():
                    self._change(part, None)
                self.model.set_weights(before)
            raise

    def _factorized(self, part: Part) -> bool:
        return bool(to_recompose(inspected(part.model, part.request), part.request))

    def _change(self, part: Part, plan: CompressionPlan | None) -> None:
        """Gives a part the structure of a plan, or of the dense model."""
        inventory = inspected(part.model, part.request)
        factorized = to_recompose(inventory, part.request)
        with recomposed(inventory, factorized, keep=True, trainer=self.model) as dense:
            if plan is not None:
                # The weights come from a file, so factors without data will do.
                apply(dense, plan, trainer=self.model, verbose=0)

    def _was_dense(self, found: Shapes, parts: Mapping[str, Part]) -> bool:
        """Whether the backup is that of this model before its compression."""
        with contextlib.ExitStack() as dense:
            compressed = any(map(self._factorized, parts.values()))
            for part in parts.values():
                inventory = inspected(part.model, part.request)
                factorized = to_recompose(inventory, part.request)
                dense.enter_context(recomposed(inventory, factorized))
            return compressed and _holds(found, self._backend.to_back_up(self.model))

    def _does_not_fit(self, missing: str) -> str:
        return (
            "Expected the backup that `BackupAndRestore` would restore to fit the model "
            f"'{self.model.name}'. Received: backup_dir={self._folder!r}, whose weights are those "
            f"of another model, without {missing}; and no plan in {self._path!r} that makes them "
            "fit. To resume, make the same model as in the training that wrote the backup; if that "
            "model was compressed, apply its plan before `fit` with `apply_plan(model, plan)`. To "
            "start over, delete the folder."
        )

    @property
    def _folder(self) -> str:
        return os.fspath(self.callback.backup_dir)

    def _read(self) -> list[Compression]:
        text = read_text(self._path)
        if text is None:
            return []
        try:
            data = json.loads(text)
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format={data['format']!r}, version={data['version']!r}")
            return [
                Compression(
                    stage["part"],
                    CompressionPlan.from_dict(stage["plan"]),
                    {name: tuple(shape) for name, shape in stage["weights"].items()},
                )
                for stage in data["stages"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected the plans of version {VERSION} that ALDSCompress keeps beside a backup "
                f"in {self._path!r}. Received: {error}. Resume with the version of keras_alds that "
                "wrote the file, or delete the folder to start over."
            ) from error

    def _write(self, stages: list[Compression]) -> None:
        data = {
            "format": FORMAT,
            "version": VERSION,
            "stages": [
                {"part": s.part, "plan": s.plan.to_dict(), "weights": s.weights} for s in stages
            ],
        }
        write_text(self._path, json.dumps(data))


def _missing(found: Shapes, wanted: Shapes) -> str | None:
    """The first weight that is not there in this shape, as text; None if all are."""
    for name, shape in wanted.items():
        if found.get(name) != shape:
            return f"'{name}' of shape {shape}"
    return None


def _holds(found: Shapes | None, wanted: Shapes) -> bool:
    return found is not None and _missing(found, wanted) is None
