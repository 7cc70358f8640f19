"""Trainings that are killed at any moment, and started again with the same script."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import lives
import numpy as np
import pytest

from keras_alds import CompressionPlan

#: How often trainings are killed for each Keras and kind of backup.
KILLS = int(os.environ.get("KERAS_ALDS_KILLS", "10"))


@pytest.fixture(scope="module")
def processes():
    """Starts processes in which TensorFlow, Keras 3 and tf_keras are imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lives", "keras", "tf_keras", "tensorflow"])
    return context.Process


@pytest.mark.slow
@pytest.mark.parametrize("batches", [None, 3])
def test_a_killed_training_goes_on(keras_module, processes, tmp_path, batches):
    rng, name = np.random.default_rng(0), keras_module.__name__
    start = time.monotonic()

    def live(folder, place="backup", call=0, kill_after=None):
        """Whether the process reaches the end of the training."""
        folder.mkdir(exist_ok=True)
        process = processes(target=lives.live, args=(name, folder, place, call, batches))
        process.start()
        process.join(kill_after)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return (folder / "end.npz").exists()

    assert live(tmp_path / "undisturbed", "")
    duration = time.monotonic() - start
    undisturbed = np.load(tmp_path / "undisturbed" / "end.npz")
    calls = dict(zip(lives.PLACES, undisturbed["counts"], strict=True))
    killed = trainings = 0
    while killed < KILLS:
        trainings += 1
        folder = tmp_path / f"training{trainings}"
        ended = False
        while not ended:
            if killed >= KILLS:  # let it end
                ended = live(folder)
                assert ended
            elif rng.random() < 0.2:
                ended = live(folder, kill_after=rng.uniform(0, duration))
                killed += not ended
            else:
                place = rng.choice(lives.PLACES)
                ended = live(folder, place, rng.integers(1, calls[place] + 1))
                killed += not ended
        assert not (folder / "backup").exists() or not [*folder.glob("backup/**/*.json")]
        end = np.load(folder / "end.npz")
        # In an epoch that was interrupted, Keras trains on its first batches once more.
        assert end["loss"] <= 2 * undisturbed["loss"]
        if batches is None:
            folders = (folder, tmp_path / "undisturbed")
            plan, expected = (CompressionPlan.load(f / "plan.json") for f in folders)
            assert plan.choices == expected.choices
            for key in (f for f in end.files if f.startswith("arr_")):
                np.testing.assert_allclose(end[key], undisturbed[key], rtol=1e-3, atol=1e-4)
