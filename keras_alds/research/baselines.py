"""The methods that the paper compares ALDS with, and its ablations.

A method with one scalar may not use the whole budget: raising the rank of one layer alone would be
another method.
"""

from __future__ import annotations

from functools import partial

from keras_alds.core.chains import CP, TUCKER
from keras_alds.core.methods import Method
from keras_alds.core.solvers import hull_chain, min_max, min_sum
from keras_alds.research import cp as cp  # adds its decomposition
from keras_alds.research import pca
from keras_alds.research.scalars import (
    energy_drops,
    errors_of_ranks,
    fractions_of_rank,
    one_scalar,
)

BASELINES = (
    Method(
        "svd",
        error_measure="energy",
        solve=partial(one_scalar, chain=fractions_of_rank),
        near_slices=1,
        published=True,
        summary="the same fraction of the full rank in every layer, one slice",
    ),
    Method(
        "svd-energy",
        error_measure="energy",
        solve=partial(one_scalar, chain=errors_of_ranks),
        near_slices=1,
        published=True,
        summary="the same part of the squared singular values in every layer, one slice",
    ),
    # Idelbayev and Carreira-Perpiñán, "Low-Rank Compression of Neural Nets: Learning the Rank of
    # Each Layer", CVPR 2020, equation 5.
    Method(
        "l-rank",
        error_measure="residual",
        solve=partial(one_scalar, chain=hull_chain),
        near_slices=1,
        published=True,
        summary="least λ·cost + squared error of every layer, one λ, one slice",
    ),
    Method(
        "pca",
        error_measure="energy",
        solve=partial(one_scalar, chain=energy_drops),
        near_slices=1,
        published=True,
        needs_data=True,
        spectra=pca.centred_spectra_many,
        factorize_with_bias=pca.factorize_pca,
        obstacle=pca.obstacle,
        summary="principal components of the layers' outputs on data, one slice",
    ),
    Method(
        "tucker",
        error_measure="energy",
        solve=min_sum,
        near_slices=1,
        schemes=(TUCKER,),
        published=True,
        takes_data=True,
        summary="Tucker-2 of windows (1×1, a small core, 1×1), the SVD of matrices",
    ),
    Method(
        "cp",
        error_measure="energy",
        solve=min_sum,
        near_slices=1,
        schemes=(CP,),
        published=True,
        takes_data=True,
        package="tensorly",
        summary="CP of windows (1×1, two depthwise, 1×1), the SVD of matrices; needs TensorLy",
    ),
    Method(
        "alds-error",
        error_measure="slice",
        solve=min_max,
        near_slices=3,
        published=True,
        summary='ranks as "alds" chooses them, for slices nearest to 3',
    ),
    Method(
        "alds-simple",
        error_measure="slice",
        solve=partial(one_scalar, chain=fractions_of_rank),
        near_slices=3,
        published=True,
        summary="the same fraction of the full rank in every layer, slices nearest to 3",
    ),
    Method(
        "alds-simple-5",
        error_measure="slice",
        solve=partial(one_scalar, chain=fractions_of_rank),
        near_slices=5,
        published=True,
        summary="the same fraction of the full rank in every layer, slices nearest to 5",
    ),
)
