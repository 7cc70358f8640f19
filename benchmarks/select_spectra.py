"""Times the choice of slices and ranks on the kernel shapes of well-known networks.

For every network, on seeded Gaussian weights and for all divisors k:

- core: `spectra_many`, then the tables, their fronts and the exact min–max solver;
- next cr: tables, fronts and solver again from the same spectra, for another budget;
- reference: one batched `np.linalg.svd(compute_uv=False)` in float32 per layer and k, as NumPy
  does it by default;
- peak memory of the core alone, in a process of its own.

Core and reference alternate in one run; medians are reported, as a Markdown table.

    python benchmarks/select_spectra.py --networks resnet20 resnet50 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from keras_alds.core.choices import choice_table
from keras_alds.core.slicing import divisors, unfold
from keras_alds.core.solvers import Solution
from keras_alds.core.spectra import Spectra, spectra_many
from keras_alds.methods import get_method

Shape = tuple[int, ...]


def resnet20() -> list[Shape]:
    shapes: list[Shape] = [(3, 3, 3, 16)]
    channels = 16
    for width in (16, 32, 64):
        for block in range(3):
            shapes += [(3, 3, channels, width), (3, 3, width, width)]
            if block == 0 and channels != width:
                shapes.append((1, 1, channels, width))
            channels = width
    return [*shapes, (64, 10)]


def resnet18() -> list[Shape]:
    shapes: list[Shape] = [(7, 7, 3, 64)]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(3, 3, channels, width), (3, 3, width, width)]
            if channels != width:
                shapes.append((1, 1, channels, width))
            channels = width
    return [*shapes, (512, 1000)]


def resnet50() -> list[Shape]:
    shapes: list[Shape] = [(7, 7, 3, 64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                shapes.append((1, 1, channels, 4 * width))
            channels = 4 * width
    return [*shapes, (2048, 1000)]


def vgg16() -> list[Shape]:
    shapes: list[Shape] = []
    channels = 3
    for width, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            shapes.append((3, 3, channels, width))
            channels = width
    return [*shapes, (25088, 4096), (4096, 4096), (4096, 1000)]


NETWORKS = {"resnet20": resnet20, "resnet18": resnet18, "resnet50": resnet50, "vgg16": vgg16}


def make_kernels(shapes: list[Shape], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[:-1]) ** -0.5)
        for shape in shapes
    ]


def solve(spectra: list[Spectra], cr: float) -> Solution:
    method = get_method("alds")
    tables = [choice_table(spectrum, error_measure=method.error_measure) for spectrum in spectra]
    dense = sum(int(table.weights.max()) for table in tables)
    return method.solve(tables, [int((1 - cr) * dense)])


def reference(kernels: list[np.ndarray]) -> None:
    for kernel in kernels:
        for k in divisors(kernel.shape[-2]):
            np.linalg.svd(unfold(kernel, k), compute_uv=False)


def seconds(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def peak_memory(name: str, seed: int) -> dict[str, float]:
    """Runs the core once in a new process; its seconds and its peak resident gigabytes."""
    command = [sys.executable, __file__, "--memory-of", name, "--seed", str(seed)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_memory(name: str, seed: int) -> None:
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    kernels = make_kernels(NETWORKS[name](), seed)
    before = peak()
    took, spectra = seconds(spectra_many, kernels)
    solve(spectra, 0.5)
    weights = sum(kernel.nbytes for kernel in kernels) / 1e9
    json.dump({"peak": peak(), "before": before, "weights": weights, "seconds": took}, sys.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of core and of reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip-reference-above",
        type=int,
        default=10_000_000,
        metavar="WEIGHTS",
        help="leave kernels with more weights out of both sides of the comparison",
    )
    parser.add_argument("--memory-of", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        report_memory(options.memory_of, options.seed)
        return

    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"NumPy {np.__version__}; medians of {options.repeats}, all divisors\n"
    )
    print("| network | core s | reference s | ratio | next cr s | largest error | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for name in options.networks:
        kernels = make_kernels(NETWORKS[name](), options.seed)
        compared = [kernel for kernel in kernels if kernel.size <= options.skip_reference_above]
        left_out = len(kernels) - len(compared)
        core, compared_core, svd, following = [], [], [], []
        solution = None
        for _ in range(options.repeats):
            took, spectra = seconds(spectra_many, kernels)
            solving, solution = seconds(solve, spectra, 0.5)
            core.append(took + solving)
            following.append(seconds(solve, spectra, 0.6)[0])
            if left_out:
                took, spectra = seconds(spectra_many, compared)
                compared_core.append(took + seconds(solve, spectra, 0.5)[0])
            else:
                compared_core.append(core[-1])
            svd.append(seconds(reference, compared)[0])
        del spectra, kernels
        memory = peak_memory(name, options.seed)
        ratio = statistics.median(svd) / statistics.median(compared_core)
        note = f" (without {left_out} largest)" if left_out else ""
        print(
            f"| {name} | {statistics.median(core):.2f} | {statistics.median(svd):.2f}{note} "
            f"| {ratio:.1f}{note} | {statistics.median(following):.3f} "
            f"| {solution.max_error:.4f} | {memory['peak']:.2f} "
            f"(weights {memory['weights']:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
