"""LiteRT (TensorFlow Lite): files that run, and what they cost where they run.

Needs `pip install "keras_alds[litert]"`. Imported when it is used: `keras_alds.litert`.
"""

__all__: list[str] = []
