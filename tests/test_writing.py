"""Text files are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from keras_alds.writing import write_whole


def test_files_beside_are_not_touched(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "a.json.new"
    other.write_text("of the user")
    write_whole(path, "é")
    assert path.read_text(encoding="utf-8") == "é"
    assert other.read_text() == "of the user"
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def interrupted(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
