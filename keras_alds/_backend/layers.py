"""What Keras 3 and tf_keras say of a layer in different words."""

from __future__ import annotations

from typing import Any


def dtype_policy(layer: Any) -> Any:
    """A layer's dtype policy."""
    policy = getattr(layer, "dtype_policy", None)
    return layer._dtype_policy if policy is None else policy
