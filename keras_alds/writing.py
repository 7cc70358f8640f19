"""Writes text files that are whole or as they were before."""

from __future__ import annotations

import contextlib
import os
import secrets


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file at once: an interruption leaves the old file or the new one."""
    # A name of its own: others may write the same file, or have one that ends in `.new`.
    beside = f"{os.fspath(path)}.{secrets.token_hex(4)}.new"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
