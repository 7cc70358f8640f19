"""Several replicas, and several processes, train one model."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_alds.models.workers import check_refinable

pytest.importorskip("tf_keras")

TESTS = Path(__file__).resolve().parents[1]


def started(*arguments: str) -> subprocess.Popen:
    """`tests/replicas.py` in a process of its own."""
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(TESTS / "replicas.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Replicas that wait for each other need threads of their own.
        env={**os.environ, "PYTHONPATH": paths, "TF_NUM_INTEROP_THREADS": "4"},
    )


def found_by(*processes: subprocess.Popen) -> list[dict]:
    """What they print."""
    try:
        ended = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, log) in zip(processes, ended, strict=True):
        assert process.returncode == 0, log[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def free_ports(count: int) -> str:
    """Ports that nothing listens on, with commas between."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ",".join(ports)


def test_replicas_of_one_process():
    (found,) = found_by(started("replicas"))
    for library in ("keras", "tf_keras"):
        of = found[library]
        np.testing.assert_allclose(of["two"], found["one"], rtol=1e-4)
        assert len(of["copies"]) == 2
        assert of["copies"][0] == of["copies"][1]
        assert "a model with 2 replicas, under MirroredStrategy" in of["refine"]
    assert found["normalized"][1] < found["normalized"][0]
    assert found["servers"][2] < found["servers"][1]


def test_two_processes():
    ports = free_ports(2)
    chief, other = found_by(*(started("worker", str(index), ports) for index in range(2)))
    assert chief["step"] == other["step"] == 8
    # The other worker had calibration data of its own, and did not use them.
    assert chief["plan"] == other["plan"]
    assert chief["state"] == other["state"]
    assert chief["losses"] == other["losses"]
    for found in (chief, other):
        assert "cr=0.5 at epoch 1 on the chief, cr=0.6 at epoch 1 on worker 1" in found["ratio"]
        assert "NaN or infinity" in found["chief"]
        assert "/kernel:0' on worker 1, which differs from the chief's" in found["bit"]
    assert "Expected the chief to compress the model. Received: " in other["chief"]


def test_the_script_of_the_documentation(tmp_path):
    page = (TESTS.parent / "docs" / "how-to" / "training.md").read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(re.search(r"```py\n(.*?)```", page, re.DOTALL).group(1))
    hosts = [f"localhost:{port}" for port in free_ports(2).split(",")]
    processes = []
    for index in range(2):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": hosts}, "task": task})
        env = {**os.environ, "TF_CONFIG": config, "TF_NUM_INTEROP_THREADS": "4"}
        env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "train.py"]
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=env))
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_one_replica_may_be_refined(small):
    check_refinable(small)
