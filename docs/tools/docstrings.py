"""Makes docstrings in the API reference look as `help()` shows them.

`keras_alds.options` declares each option of `select` once, and adds them to signatures and
docstrings when the package is imported. The reference is made from the source, without an import
of TensorFlow, so the same has to be done here.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

from keras_alds.options import OPTION_NAMES, declared, documented


def left_out(function: griffe.Function) -> tuple[str, ...] | None:
    """The options that a function does not take; None if it takes none at all."""
    for decorator in function.decorators:
        call = ast.parse(str(decorator.value), mode="eval").body
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "takes_options":
            return next((ast.literal_eval(word.value) for word in call.keywords), ())
    return None


def with_options(parameters: griffe.Parameters, names: list[str]) -> griffe.Parameters:
    """The parameters of a function with the options in place of `**options`."""
    kept = [p for p in parameters if p.kind is not griffe.ParameterKind.var_keyword]
    keyword_only = griffe.ParameterKind.keyword_only
    added = [
        griffe.Parameter(name, kind=keyword_only, default=repr(declared(name).default))
        for name in names
    ]
    return griffe.Parameters(*kept, *added)


class Docstrings(griffe.Extension):
    """Adds the options, shows examples as code, and makes names of pages links."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Adds the options to a function that takes them."""
        without = left_out(func)
        if without is None:
            return
        names = [name for name in OPTION_NAMES if name not in without]
        func.parameters = with_options(func.parameters, names)
        if func.docstring:
            func.docstring.value = documented(func.docstring.value, names)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Adds the options to the docstring of a class that takes them."""
        if cls.docstring:
            cls.docstring.value = documented(cls.docstring.value)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Marks examples, of which griffe knows the plural only, and makes links."""
        if obj.docstring:
            text = re.sub(r"^Example:(?=\n +>>>)", "Examples:", obj.docstring.value, flags=re.M)
            text = re.sub(r"^Example:(?=\n```)", "**Example:**\n", text, flags=re.M)
            text = re.sub(r"docs/([\w/-]+)\.md", r"[\1](../\1.md)", text)
            obj.docstring.value = text
