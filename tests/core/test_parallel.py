"""Thread pools at the end of a program, after a fork, and without threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from keras_alds.core import parallel
from keras_alds.core.parallel import map_within, single_threaded_blas, threads

PROGRAM = """
import threading, time
from keras_alds.core.parallel import map_within, threads
from keras_alds.core.spectra import spectra_many
import numpy as np

def late():
    time.sleep(0.5)  # the main thread has ended
    with threads() as pool:
        print(list(pool.map(abs, [-1, 2])), map_within(pool, pow, [(2, 3), (3, 2)]))
    print(len(spectra_many([np.eye(8, dtype="float32")])), "spectra")

threading.Thread(target=late).start()
"""


def test_at_the_end_of_a_program():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == ["[1, 2] [8, 9]", "1 spectra"], run.stderr


def test_a_call_runs_once_where_no_thread_starts(monkeypatch):
    calls = []

    def start(thread):
        raise RuntimeError("can't start new thread")

    with threads() as pool:
        monkeypatch.setattr(threading.Thread, "start", start)
        assert list(pool.map(lambda x: calls.append(x) or 2 * x, range(5))) == [0, 2, 4, 6, 8]
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 / 0).result()
        monkeypatch.undo()
        assert pool.submit(int, "3").result() == 3
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_after_a_fork(monkeypatch):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with single_threaded_blas(), parallel._lock:
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(20)
    child = os.fork()
    if child == 0:  # the other thread and its lock are in the parent only
        try:
            with single_threaded_blas(), threads() as pool:
                good = list(pool.map(np.linalg.norm, [np.eye(2)])) and parallel._users == 1
            os._exit(0 if good and parallel._users == 0 else 1)
        finally:
            os._exit(2)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_ends_the_wait_for_calls_that_still_run():
    leave, begun = threading.Event(), []

    def call(what):
        begun.append(what)
        if what == "fails":
            raise ArithmeticError(what)
        assert leave.wait(20)

    with ThreadPoolExecutor(2) as pool:
        try:
            with pytest.raises(ArithmeticError, match="fails"):
                map_within(pool, call, [("waits",), ("fails",), *[("waits",)] * 9])
            assert not leave.is_set()
        finally:
            leave.set()
    assert len(begun) <= 3
