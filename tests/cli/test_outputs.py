"""Files that commands write: checked before the work, whole or as they were after it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keras_alds.cli import outputs
from keras_alds.cli.outputs import Outputs, add_output


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """Parses arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_output(parser, "-o", "--output", endings=(".keras", ".h5"), help="a model")
    add_output(parser, "--save-plan", endings=(".json",), help="a plan")
    add_output(parser, "--folder", endings=(), help="a folder")
    return parser.parse_args


def test_what_cannot_be_written_is_refused_before_the_work(parsed, monkeypatch):
    Path("old.keras").write_text("old")
    Path("dir.keras").mkdir()
    Path("full").mkdir()
    Path("full/file").touch()
    for text, *given in (
        ("--output to name a file that ends in .keras or .h5. Received: a.txt", "-o", "a.txt"),
        ("--output to lie in a folder that exists. Received: no/a.keras. Make", "-o", "no/a.keras"),
        ("--output to name a new file. Received: old.keras, which", "-o", "old.keras"),
        ("--output to name a file. Received: dir.keras, a folder", "-o", "dir.keras", "--force"),
        ("--folder to name a new or empty folder. Received: full", "--folder", "full"),
        ("--folder to name a folder. Received: old.keras", "--folder", "old.keras", "--force"),
        ("--save-plan to lie in a folder that exists", "-o", "a.h5", "--save-plan", "no/p.json"),
    ):
        with pytest.raises(ValueError, match="Expected ") as info:
            Outputs(parsed(given))
        assert text in str(info.value)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="that you may write to"):
        Outputs(parsed(["-o", "a.keras"]))
    assert sorted(os.listdir()) == ["dir.keras", "full", "old.keras"]


def test_two_outputs_in_one_place_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    for name in ("--one", "--two"):
        add_output(parser, name, endings=(".csv",), help="a table")
    with pytest.raises(ValueError, match="different files for --one and --two"):
        Outputs(parser.parse_args(["--one", "a.csv", "--two", "./a.csv"]))


def test_files_appear_together_at_the_end(parsed):
    Path("m.keras").write_text("old")
    arguments = parsed(["-o", "m.keras", "--force", "--folder", "runs/new"])
    with Outputs(arguments).kept_tidy() as found:
        found.path("output").write_text("new")
        found.path("folder").mkdir()
        (found.path("folder") / "table").touch()
        assert found.path("save_plan") is None
        assert Path("m.keras").read_text() == "old"
        assert found.publish() == {"output": "m.keras", "folder": str(Path("runs/new"))}
    assert Path("m.keras").read_text() == "new"
    assert sorted(os.listdir()) == ["m.keras", "runs"]
    assert os.listdir("runs/new") == ["table"]


def test_a_folder_that_exists_is_all_that_is_touched(parsed, monkeypatch):
    """It may be a disk of its own, in a folder that may not be written to."""
    Path("disk").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name == "disk")
    with Outputs(parsed(["--folder", "disk"])).kept_tidy() as found:
        found.path("folder").mkdir()
        (found.path("folder") / "table").touch()
        assert os.listdir() == ["disk"]
        found.publish()
    assert os.listdir("disk") == ["table"]


def test_what_others_wrote_in_the_meantime_is_not_replaced(parsed):
    with Outputs(parsed(["-o", "m.H5", "--save-plan", "p.json"])).kept_tidy() as found:
        assert found.path("output").suffix == ".h5"
        found.path("output").write_text("new")
        found.path("save_plan").write_text("plan")
        Path("p.json").write_text("of another process")
        with pytest.raises(ValueError, match=r"a new file\. Received: p\.json, which exists"):
            found.publish()
    assert Path("p.json").read_text() == "of another process"
    assert os.listdir() == ["p.json"]


def write_both(arguments):
    """Writes two files, and fails if the process is interrupted or a file cannot be moved."""
    with Outputs(arguments).kept_tidy() as found:
        found.path("output").write_text("new")
        found.path("save_plan").write_text("plan")
        found.publish()


def test_a_failure_leaves_everything_as_it_was(parsed, monkeypatch):
    Path("m.keras").write_text("old")
    arguments = parsed(["-o", "m.keras", "--save-plan", "p.json", "--force"])
    for count, content in enumerate(("old", "new")):  # files that are moved before the failure
        moved = []

        def replace(source, place, count=count, moved=moved):
            if len(moved) == count:
                raise KeyboardInterrupt
            moved.append(Path(source).rename(place))

        monkeypatch.setattr(outputs.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write_both(arguments)
        assert os.listdir() == ["m.keras"]
        assert Path("m.keras").read_text() == content


# A command that writes half of its first file, and then waits.
WAITING = """
import signal, sys, time, types
from keras_alds import cli

def add_arguments(parser):
    cli.outputs.add_output(parser, "-o", "--output", endings=(".json",), help="a file")

def run(arguments):
    arguments.outputs.path("output").write_text("{")
    print("waiting", flush=True)
    time.sleep(60)

cli.COMMANDS["wait"] = ("wait", "wait")
cli.quiet_tensorflow = lambda: None
sys.modules["keras_alds.cli.wait"] = types.SimpleNamespace(
    add_arguments=add_arguments, run=run, USAGE="", EXAMPLES=""
)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
cli.main(["wait", "-o", "out.json"])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_command_leaves_nothing(number, status, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(number)
    _, text = process.communicate(timeout=30)
    assert process.returncode == status, text
    assert "Traceback" not in text
    assert os.listdir(tmp_path) == []


# A command that prints a line.
PRINTING = """
import sys, types
from keras_alds import cli
from keras_alds.cli.answers import Answer

cli.COMMANDS["say"] = ("say", "say")
cli.quiet_tensorflow = lambda: None
sys.modules["keras_alds.cli.say"] = types.SimpleNamespace(
    add_arguments=lambda parser: None,
    run=lambda arguments: Answer({}, lambda: print("word")),
    USAGE="", EXAMPLES="",
)
sys.exit(cli.main(["say"]))
"""


def test_a_reader_that_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        run = subprocess.run(
            [sys.executable, "-c", PRINTING],
            env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")
