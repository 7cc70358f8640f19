import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from keras_alds.core import parallel
from keras_alds.core import spectra as module
from keras_alds.core.slicing import divisors, full_rank, recompose, unfold
from keras_alds.core.spectra import factorize, spectra, spectra_many

# Filter side, row side and both; a side of 1; divisors that do not divide each other.
SHAPES = [
    (3, 3, 16, 16),
    (3, 3, 24, 20),
    (3, 3, 3, 40),
    (1, 1, 64, 16),
    (1, 1, 12, 48),
    (5, 30, 12),
    (2, 3, 2, 6, 10),
    (60, 7),
    (36, 40),
    (7, 1),
    (3, 3, 6, 1),
    (1, 9),
    (3, 3, 1, 8),
]


def kernel_of(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def check_against_svd(kernel, found):
    norm = np.linalg.norm(unfold(kernel, 1)[0].astype(np.float64), 2)
    energy = np.square(kernel.astype(np.float64)).sum()
    np.testing.assert_allclose(found.norm, norm, rtol=1e-9)
    np.testing.assert_allclose(found.energy, energy, rtol=1e-9)
    for k, spectrum in found.slices.items():
        sigma = np.linalg.svd(unfold(kernel, k).astype(np.float64), compute_uv=False)
        rank = full_rank(kernel.shape, k)
        assert spectrum.rank == rank
        largest = [sigma[:, j:].max(initial=0.0) for j in range(rank + 1)]
        dropped = [np.square(sigma[:, j:]).sum() for j in range(rank + 1)]
        np.testing.assert_allclose(spectrum.residual_norm, largest, rtol=1e-9, atol=1e-6 * norm)
        np.testing.assert_allclose(spectrum.residual_energy, dropped, rtol=1e-9, atol=1e-9 * energy)
        assert spectrum.residual_norm[-1] == 0
        assert spectrum.residual_energy[-1] == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectra_equal_the_svd_of_every_slice(shape):
    kernel = kernel_of(shape)
    found = spectra(kernel)
    assert tuple(found.slices) == divisors(shape[-2])
    check_against_svd(kernel, found)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(1, 36),
    st.integers(1, 24),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_spectra_equal_the_svd_on_any_shape(spatial, c, f, seed, dtype):
    kernel = kernel_of((*spatial, c, f), seed, dtype)
    check_against_svd(kernel, spectra(kernel))


@pytest.mark.parametrize("shape", [(3, 3, 24, 20), (60, 7), (12, 48)], ids=str)
def test_every_path_gives_the_same_bits(shape, monkeypatch):
    """Split layers and batches of another size change no number."""
    kernel = kernel_of(shape)
    expected = as_bytes([spectra(kernel)])
    monkeypatch.setattr(module, "_ITEM_COST", 1.0)
    assert as_bytes([spectra(kernel)]) == expected
    # The Gram matrices wait for each other no more.
    monkeypatch.setattr(module, "_GRAM_ENTRIES", 0)
    assert as_bytes([spectra(kernel)]) == expected


@pytest.mark.parametrize("shape", [(3, 3, 24, 20), (60, 7), (12, 48)], ids=str)
def test_bounded_working_copies_change_nothing_but_rounding(shape, monkeypatch):
    kernel = kernel_of(shape)
    monkeypatch.setattr(module, "_COPY_ENTRIES", 50)
    monkeypatch.setattr(module, "_BATCH_ENTRIES", 1)
    check_against_svd(kernel, spectra(kernel))


def test_chosen_slices_only():
    kernel = kernel_of((3, 3, 12, 10))
    every, some = spectra(kernel), spectra(kernel, slices=[4, 3, 4])
    assert tuple(some.slices) == (3, 4)
    # Gram matrices are summed from other parts: equal but for rounding.
    np.testing.assert_allclose(some.norm, every.norm, rtol=1e-13)
    np.testing.assert_allclose(some.energy, every.energy, rtol=1e-13)
    for k in (3, 4):
        np.testing.assert_allclose(
            some.slices[k].residual_norm, every.slices[k].residual_norm, rtol=1e-10
        )
    many = spectra_many([kernel, kernel_of((8, 5))], slices=[3, 8, 1])
    assert [tuple(s.slices) for s in many] == [(1, 3), (1, 8)]


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (40, 12), (8, 30)], ids=str)
def test_rank_deficient_slices_have_no_error_at_their_rank(shape):
    # Small integers: the product is exact in float32, hence truly of rank 2.
    rng = np.random.default_rng(0)
    rows = int(np.prod(shape[:-1]))
    matrix = rng.integers(-3, 4, (rows, 2)) @ rng.integers(-3, 4, (2, shape[-1]))
    kernel = np.moveaxis(
        matrix.astype(np.float32).reshape(shape[-2], *shape[:-2], shape[-1]), 0, -2
    )
    for spectrum in spectra(kernel).slices.values():
        assert (spectrum.residual_norm[:2] > 0).sum() == min(2, spectrum.rank)
        assert not spectrum.residual_norm[2:].any()
        assert not spectrum.residual_energy[2:].any()


def test_kernel_of_zeros():
    found = spectra(np.zeros((3, 3, 4, 6), np.float32))
    assert found.norm == 0
    assert found.energy == 0
    assert all(not s.residual_norm.any() for s in found.slices.values())


def test_spectra_cannot_be_changed():
    found = spectra(kernel_of((4, 6)))
    with pytest.raises(ValueError, match="read-only"):
        found.slices[2].residual_norm[0] = 1
    with pytest.raises(TypeError):
        found.slices[2] = found.slices[1]
    with pytest.raises(AttributeError):
        found.norm = 1.0


def test_kernel_is_not_changed():
    kernel = kernel_of((3, 3, 8, 16), dtype=np.float64)
    before = kernel.copy()
    spectra(kernel)
    factorize(kernel, 2, 3)
    np.testing.assert_array_equal(kernel, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    kernel = kernel_of((3, 3, 4, 6))
    kernel[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"finite numbers.*1 NaN or infinite entries of 216"):
        spectra(kernel)
    with pytest.raises(ValueError, match="at index 1"):
        spectra_many([kernel_of((4, 4)), kernel])
    with pytest.raises(ValueError, match="finite numbers"):
        factorize(kernel, 1, 1)


def test_other_bad_input():
    with pytest.raises(ValueError, match="Received: slices=3"):
        spectra(kernel_of((4, 6)), slices=[3])
    with pytest.raises(ValueError, match=r"Received: slices=\(\)"):
        spectra(kernel_of((4, 6)), slices=[])
    with pytest.raises(ValueError, match="real numbers"):
        spectra(np.zeros((4, 6), complex))
    with pytest.raises(ValueError, match="without empty axes"):
        spectra(np.zeros((0, 6)))
    assert spectra_many([]) == []


# --- the same bits everywhere, and BLAS left as it was ---------------------------------------


def as_bytes(found):
    parts = []
    for one in found:
        parts.append(np.array([one.norm, one.energy]).tobytes())
        for k, spectrum in one.slices.items():
            parts += [bytes(str(k), "ascii"), spectrum.residual_norm.tobytes()]
            parts.append(spectrum.residual_energy.tobytes())
    return b"".join(parts)


DETERMINISM_SHAPES = [(3, 3, 64, 96), (1, 1, 256, 128), (300, 200), (3, 3, 24, 20)]

SCRIPT = """
import hashlib
import numpy as np
import test_spectra as t
from keras_alds.core.spectra import factorize, spectra_many
kernels = [t.kernel_of(shape) for shape in t.DETERMINISM_SHAPES]
digest = hashlib.sha256(t.as_bytes(spectra_many(kernels)))
for factor in factorize(kernels[0], 2, 30):
    digest.update(factor.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_same_bits_in_any_process():
    digests = set()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for threads in ("1", "2", "4"):
        environment = dict(os.environ, PYTHONPATH=root)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = threads
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            cwd=os.path.dirname(os.path.abspath(__file__)),
            check=True,
            capture_output=True,
            text=True,
        )
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1


def test_same_bits_with_any_executor():
    kernels = [kernel_of(shape) for shape in DETERMINISM_SHAPES]
    expected = as_bytes(spectra_many(kernels))
    for workers in (1, 3):
        with ThreadPoolExecutor(workers) as pool:
            assert as_bytes(spectra_many(kernels, executor=pool)) == expected
    # Alone or among others.
    assert as_bytes([spectra(kernels[1])]) == as_bytes(spectra_many(kernels)[1:2])


@pytest.mark.slow
def test_process_pool():
    kernels = [kernel_of(shape) for shape in [(3, 3, 24, 20), (12, 48), (6, 1)]]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert as_bytes(spectra_many(kernels, executor=pool)) == as_bytes(spectra_many(kernels))


def test_pickle():
    found = spectra(kernel_of((3, 3, 8, 6)))
    again = pickle.loads(pickle.dumps(found))
    assert again.kernel_shape == found.kernel_shape
    assert as_bytes([again]) == as_bytes([found])


def blas_threads():
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


class RecordingExecutor(ThreadPoolExecutor):
    """Notes the BLAS threads while an item runs."""

    def __init__(self, fail=False):
        super().__init__(1)
        self.seen, self.fail = [], fail

    def submit(self, function, /, *arguments, **keywords):
        self.seen += blas_threads()
        if self.fail:
            future = Future()
            future.set_exception(RuntimeError("worker lost"))
            return future
        return super().submit(function, *arguments, **keywords)


def test_one_blas_thread_while_it_runs_and_restored_after():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with RecordingExecutor() as pool:
            spectra(kernel_of((3, 3, 8, 6)), executor=pool)
        assert set(pool.seen) == {1}
        assert blas_threads() == before
        with RecordingExecutor(fail=True) as pool, pytest.raises(RuntimeError, match="worker lost"):
            spectra(kernel_of((3, 3, 8, 6)), executor=pool)
        assert blas_threads() == before
        spectra(kernel_of((3, 3, 8, 6)))
        assert blas_threads() == before


def test_limits_of_overlapping_threads_do_not_leak():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        entered, leave = threading.Event(), threading.Event()

        def second():
            with parallel.single_threaded_blas():
                entered.set()
                leave.wait(10)

        other = threading.Thread(target=second)
        with parallel.single_threaded_blas():
            other.start()
            assert entered.wait(10)
        # The first one in has left, the second one still needs the limit.
        assert set(blas_threads()) == {1}
        leave.set()
        other.join()
        assert blas_threads() == before


def test_limit_holds_in_a_thread_while_another_one_has_set_its_own():
    with threadpool_limits(2, user_api="blas"):
        before, seen = blas_threads(), []

        def work():
            with parallel.single_threaded_blas():
                seen.extend(blas_threads())

        other = threading.Thread(target=work)
        other.start()
        other.join()
        assert set(seen) == {1}
        assert blas_threads() == before


# --- factors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_factors_give_the_kernel_back(shape):
    kernel = kernel_of(shape)
    for k in divisors(shape[-2]):
        rank = full_rank(shape, k)
        encoder, decoder = factorize(kernel, k, rank)
        assert encoder.shape == (*shape[:-2], shape[-2] // k, k * rank)
        assert decoder.shape == (k * rank, shape[-1])
        assert encoder.dtype == decoder.dtype == kernel.dtype
        again = recompose(encoder.astype(np.float64), decoder.astype(np.float64), k)
        assert np.linalg.norm(again - kernel) <= 1e-6 * np.linalg.norm(kernel)


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (24, 10), (3, 6, 40)], ids=str)
def test_truncated_factors_are_optimal_and_balanced(shape):
    kernel = kernel_of(shape, dtype=np.float64)
    found = spectra(kernel)
    for k in divisors(shape[-2])[:-1]:
        for rank in range(1, full_rank(shape, k)):
            encoder, decoder = factorize(kernel, k, rank)
            residual = unfold(kernel - recompose(encoder, decoder, k), k)
            spectrum = found.slices[k]
            np.testing.assert_allclose(
                np.linalg.norm(residual, 2, axis=(1, 2)).max(),
                spectrum.residual_norm[rank],
                rtol=1e-6,
            )
            np.testing.assert_allclose(
                np.square(residual).sum(), spectrum.residual_energy[rank], rtol=1e-6
            )
            lengths = np.square(encoder).reshape(-1, k * rank).sum(axis=0)
            np.testing.assert_allclose(lengths, np.square(decoder).sum(axis=1), rtol=1e-6)
            columns = encoder.reshape(-1, k * rank)
            assert (columns[np.abs(columns).argmax(axis=0), np.arange(k * rank)] > 0).all()


def test_factors_of_zeros_and_of_deficient_rank_are_finite():
    for kernel in (np.zeros((3, 3, 4, 6), np.float32), np.ones((3, 3, 4, 6), np.float32)):
        encoder, decoder = factorize(kernel, 2, 5)
        assert np.isfinite(encoder).all()
        assert np.isfinite(decoder).all()
        np.testing.assert_allclose(recompose(encoder, decoder, 2), kernel, atol=1e-6)


def test_integer_kernel_gives_floating_point_factors():
    encoder, decoder = factorize(np.arange(12).reshape(4, 3), 1, 3)
    assert encoder.dtype == np.float64
    expected = np.arange(12).reshape(4, 3)
    np.testing.assert_allclose(recompose(encoder, decoder, 1), expected, atol=1e-12)


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"from 1 to 6.*Received: rank={rank}"):
        factorize(kernel_of((3, 3, 4, 6)), 2, rank)
