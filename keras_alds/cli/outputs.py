"""The files that a command writes: checked before its work, complete or absent after it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

#: The endings of files that hold a Keras model.
MODEL_ENDINGS = (".keras", ".h5")
# How the names of temporary folders begin.
_PREFIX = ".keras_alds-"


class _Declared(NamedTuple):
    """An output as a command declares it: how messages name it, its endings; () for a folder."""

    flag: str
    endings: tuple[str, ...]


def add_output(
    parser: Any,
    *flags: str,
    endings: tuple[str, ...],
    help: str,
    required: bool = False,
    default: Path | None = None,
) -> None:
    """Adds the argument for a file to write, or for a folder if `endings` is empty.

    Args:
        parser: The parser of a command, or a group of its arguments.
        flags: The names, such as `"-o"` and `"--output"`; the last one names the attribute.
        endings: The allowed endings of the file.
        help: Its line in `--help`.
        required: Whether the command needs it; a positional argument always is.
        default: Where to write if the user says nothing.
    """
    declared = parser.get_default("declared") or {}
    if not declared:
        parser.add_argument("--force", action="store_true", help="replace files that exist")
    needed = {"required": required} if flags[-1].startswith("-") else {}
    parser.add_argument(*flags, type=Path, default=default, help=help, **needed)
    name = flags[-1].lstrip("-").replace("-", "_")
    parser.set_defaults(declared={**declared, name: _Declared(flags[-1], endings)})


class Outputs:
    """The outputs of one command.

    All are written to temporary folders beside their places first, or in them if they are folders
    that exist. `publish` then moves them, so that a file is either whole or as it was before.

    Raises:
        ValueError: If a file could not be written, or exists and there is no `--force`.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        declared: Mapping[str, _Declared] = getattr(arguments, "declared", None) or {}
        self._places = {
            name: getattr(arguments, name) for name in declared if getattr(arguments, name)
        }
        self._declared, self._force = declared, getattr(arguments, "force", False)
        self._temporary: dict[str, Path] = {}
        self._check_all(self._places)
        by_place: dict[Path, str] = {}
        for name, place in self._places.items():
            other = by_place.setdefault(place.resolve(), name)
            if other != name:
                raise ValueError(
                    f"Expected different files for {declared[other].flag} and "
                    f"{declared[name].flag}. Received: {place} for both"
                )

    def __len__(self) -> int:
        return len(self._places)

    def path(self, name: str) -> Path | None:
        """Where to write an output for now; None if the user did not ask for it."""
        place = self._places.get(name)
        if place is None:
            return None
        if name not in self._temporary:
            folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_existing(place))
            # Keras knows `.keras`, and not `.KERAS`.
            self._temporary[name] = Path(folder) / f"output{place.suffix.lower()}"
        return self._temporary[name]

    def publish(self) -> dict[str, str]:
        """Moves everything to its place; returns the places by the names of the arguments.

        Raises:
            ValueError: If a file has come to exist since, and there is no `--force`.
        """
        self._check_all(self._temporary)
        written = {}
        for name, source in self._temporary.items():
            place = self._places[name]
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
                for file in source.iterdir():
                    os.replace(file, place / file.name)
            else:
                os.replace(source, place)
            written[name] = str(place)
        return written

    @contextlib.contextmanager
    def kept_tidy(self) -> Iterator[Outputs]:
        """Removes the temporary folders at the end, whatever happens."""
        try:
            yield self
        finally:
            for path in self._temporary.values():
                shutil.rmtree(path.parent, ignore_errors=True)

    def _check_all(self, names: Iterable[str]) -> None:
        for name in names:
            _check(self._places[name], self._declared[name], force=self._force)


def _existing(place: Path) -> Path:
    """The innermost folder that exists: the place itself, or one above it.

    A folder may be a disk of its own, to which files cannot be moved from above.
    """
    path = place.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _check(place: Path, declared: _Declared, *, force: bool) -> None:
    flag, endings = declared
    if endings and place.suffix.lower() not in endings:
        raise ValueError(
            f"Expected {flag} to name a file that ends in {' or '.join(endings)}. Received: {place}"
        )
    if endings and place.is_dir():
        raise ValueError(f"Expected {flag} to name a file. Received: {place}, a folder")
    if not endings and place.exists() and not place.is_dir():
        raise ValueError(f"Expected {flag} to name a folder. Received: {place}, a file")
    folder = _existing(place)
    if endings and folder != place.absolute().parent:
        raise ValueError(
            f"Expected {flag} to lie in a folder that exists. Received: {place}. Make the folder "
            f"{place.parent} first."
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"Expected {flag} to lie in a folder that you may write to. Received: {place}"
        )
    taken = place.exists() if endings else place.is_dir() and not _is_empty(place)
    if taken and not force:
        raise ValueError(
            f"Expected {flag} to name a new {'file' if endings else 'or empty folder'}. Received: "
            f"{place}, which exists. Pass --force to replace it."
        )


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but temporary folders."""
    return all(path.name.startswith(_PREFIX) for path in folder.iterdir())
