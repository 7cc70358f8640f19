"""The commands of docs/cli.md run, and it names all there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest
import zoo

from keras_alds.cli import COMMANDS, main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def test_every_command_is_described():
    assert set(COMMANDS) == set(
        re.findall(r"`([a-z-]+)`", " ".join(re.findall(r"\n\| \[.*", PAGE)))
    )


def test_commands_run(tmp_path, monkeypatch):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.chdir(tmp_path)
    model = zoo.functional(keras)
    model.save("model.keras")
    x, y = zoo.images(32)
    np.savez("images.npz", x_train=x, x_test=x, y_test=y)
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.M | re.S)
    commands = "".join(blocks).replace("\\\n", "").splitlines()
    assert len(commands) > 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "keras_alds"
        assert main(arguments) == 0
