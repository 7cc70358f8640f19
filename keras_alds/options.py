"""The options of a compression, each declared once: name, type, default, documentation, check.

`SelectOptions` declares them for `select`, `compress`, `ALDSCompress`, `sweep` and the command
line. `takes_options` adds them to a function's signature and docstring, `Options` checks their
values, and `add_flags` adds them to an argument parser.
"""

# No `from __future__ import annotations`: the annotations of `SelectOptions` are read at run time.

import dataclasses
import inspect
import numbers
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict, TypeVar

from keras_alds.core.checks import did_you_mean, is_fraction, positive_int
from keras_alds.core.errors import ERRORS
from keras_alds.core.methods import Method
from keras_alds.core.slicing import SCHEMES
from keras_alds.methods import METHODS, choose_method, get_method
from keras_alds.naming import Bound, check_bounds, check_exclude
from keras_alds.plan import CompressionPlan, check_plan
from keras_alds.resources import JOINT, MEMORY, RESOURCES
from keras_alds.targets import ALIASES, CPU, SIZE, TARGETS, get_target

#: The number formats whose latency is measured; None is float32.
QUANTIZE = (None, "int8")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Attributes:
        default: Its default.
        doc: Its paragraph in a docstring's `Args`.
        flag: Arguments for `ArgumentParser.add_argument`, or None if the command line does not
            have the option.
    """

    default: Any
    doc: str
    flag: Mapping[str, Any] | None = None

    def paragraph(self, name: str, indent: str) -> list[str]:
        """The lines of its entry in a docstring's `Args`."""
        text = " ".join(self.doc.split())
        return textwrap.wrap(
            f"{name}: {text}",
            100,
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def layer_bounds(text: str) -> tuple[str, tuple[float | None, float | None]]:
    """An entry of `bounds` as the command line has it, `LAYER=LEAST:GREATEST`."""
    layer, _, fractions = text.rpartition("=")
    least, _, greatest = fractions.partition(":")
    if not layer:
        raise ValueError(text)
    return layer, (float(least) if least else None, float(greatest) if greatest else None)


def fold_schemes(text: str) -> str | list[int]:
    """Fold schemes as the command line has them; `argparse` names this function in its error."""
    return text if text == "all" else [int(part) for part in text.split(",")]


class SelectOptions(TypedDict, total=False):
    """The options that `select`, `compress`, `ALDSCompress`, `sweep` and the commands share."""

    method: Annotated[
        str | None,
        Option(
            None,
            """String or None. `"energy"` minimises the sum of the layers' relative squared errors.
            `"alds"` is the paper's method, solved exactly: it minimises the largest relative
            error of any layer. `"activation"` minimises the sum of the relative squared errors of
            the layers' outputs on `calibration_data`. `"synthetic"` does so on noise that is made
            to fit the model's BatchNormalization. The others are the paper's baselines: `"svd"`,
            `"svd-energy"`, `"l-rank"`, `"pca"` (needs data), `"alds-error"`, `"alds-simple"`,
            `"alds-simple-5"`; and tensor decompositions, with data or without: `"tucker"`, and
            `"cp"`, which needs TensorLy. Defaults to None: `"activation"` with calibration data,
            `"alds"` with an `error_measure`, else `"synthetic"`, or `"energy"` for models for
            which that is not possible.""",
            flag={
                "choices": [name for name, known in METHODS.items() if not known.needs_data],
                "help": "default: as for `select`",
            },
        ),
    ]
    objective: Annotated[
        str,
        Option(
            "params",
            """String, what `cr` counts: `"params"`, `"macs"` or `"latency"`. With `"latency"`, no
            layer becomes slower than its dense form. Defaults to `"params"`.""",
            flag={"choices": list(RESOURCES), "help": "what the fraction counts (default: params)"},
        ),
    ]
    error_measure: Annotated[
        str | None,
        Option(
            None,
            """String or None. The error measure, if not the method's own: `"slice"`, `"bound"`,
            `"spectral"`, `"energy"` or `"residual"`. Defaults to None: the method's own
            (`"slice"` for `"alds"`).""",
            flag={"choices": list(ERRORS), "help": "error measure (default: the method's own)"},
        ),
    ]
    exclude: Annotated[
        Any,
        Option(
            (),
            """Layers to skip: a name, a path (`"encoder/conv1"`), a regular expression that
            matches the whole name or path, a compiled pattern (found anywhere in them), a
            layer class, or a list of these. The name of a nested model, a wrapper or an
            attention layer stands for all layers inside it. A string that is neither a name nor
            a pattern of one may be an attribute path (`"teacher"`, `"blocks.0"`). Defaults to
            none.""",
            flag={
                "nargs": "+",
                "action": "extend",
                "metavar": "LAYER",
                "help": "layers to skip: names, paths or regular expressions",
            },
        ),
    ]
    max_slices: Annotated[
        int | None,
        Option(
            None,
            """Integer or None. Largest number of slices k. More slices preserve more accuracy but
            run slower. Defaults to None: no limit.""",
            flag={"type": int, "help": "largest number of slices (default: no limit)"},
        ),
    ]
    rank_multiple: Annotated[
        int,
        Option(
            1,
            """Integer. Ranks j are multiples of it; 4 or 8 suit vector units. Defaults to 1.""",
            flag={"type": int, "help": "ranks are multiples of this (default: 1)"},
        ),
    ]
    target: Annotated[
        str | None,
        Option(
            None,
            """String or None. What the model is for: `"cpu"` (common CPUs, with LiteRT or Keras,
            float or int8), `"litert"` (LiteRT on a CPU with XNNPACK; `"tflite"` means the same),
            `"litert-reference"` (its built-in kernels, microcontrollers), `"gpu-delegate"`, or
            `"size"`. Only forms that run well there are chosen. `"size"` allows all of them: thin
            slices keep more accuracy at the same size, and run slower than the original. With
            calibration data and a named target, and unless the objective is `"latency"`, the plan
            shows how much error the constraints add. Defaults to None: `"litert"` with
            `objective="latency"`; no constraints with `max_slices`, an `error_measure` or a
            published method such as `"alds"`; else `"cpu"`, and a warning is issued if `cr`
            cannot be reached for it and other forms of one slice are taken.""",
            flag={
                "choices": [*TARGETS, *ALIASES, SIZE],
                "help": "what the model is for (default: as for `select`)",
            },
        ),
    ]
    bounds: Annotated[
        Mapping[Any, tuple[float | None, float | None]] | None,
        Option(
            None,
            """Dict from layers, named as in `exclude`, to `(least, greatest)`: fractions of the
            layer's own parameters to remove, None for no bound, as in `{"stem": (None, 0.3),
            r"block3/.*": (0.4, 0.8)}`. If several entries name a layer, all of them apply.
            Defaults to None: no bounds.""",
            flag={
                "type": layer_bounds,
                "action": "append",
                "metavar": "LAYER=LEAST:GREATEST",
                "help": "least and greatest fraction of a layer to remove, as in stem=:0.3 or "
                "block3/.*=0.4:0.8; may be repeated",
            },
        ),
    ]
    latency_table: Annotated[
        Any,
        Option(
            None,
            """With `objective="latency"`: a `keras_alds.litert.LatencyTable`, or the path of its
            CSV file. Defaults to None: latency is measured on this machine with LiteRT, on one
            thread, once per process.""",
            flag={"help": "CSV file of a latency table (default: measured on this machine)"},
        ),
    ]
    quantize: Annotated[
        str | None,
        Option(
            None,
            """With `objective="latency"`: `"int8"` if the model will be quantized to int8, so that
            the latency of int8 files is measured. A `latency_table` has to be in int8 then.
            Defaults to None: as in the table, or float32.""",
            flag={
                "choices": [name for name in QUANTIZE if name],
                "help": "whether latency is that of int8 files (default: float32)",
            },
        ),
    ]
    schemes: Annotated[
        int | str | Sequence[int] | None,
        Option(
            None,
            """Integer, sequence of integers, `"all"` or None. The fold schemes that may unfold a
            convolution's kernel: in 0 the encoder has the whole window, in 1 the decoder has
            the height, in 2 the width, and in 3 both. Conv1D and Conv3D have schemes 0 and 3. All
            other layers, and 1×1 kernels, have scheme 0 only. The solver chooses a scheme for every
            layer, together with slices and rank. Convolutions without an allowed scheme are
            skipped. With a target, schemes 1 to 3 have one slice. Defaults to None: all schemes, or
            only 0 with a published method such as `"alds"`, and with `"energy"` for many
            slices.""",
            flag={
                "type": fold_schemes,
                "help": "fold schemes to choose from: all, or numbers as in 0,3 (default: "
                "all; 0 with a published method)",
            },
        ),
    ]


def declared(name: str) -> Option:
    """The declaration of the option `name`."""
    (option,) = SelectOptions.__annotations__[name].__metadata__
    return option


OPTION_NAMES = tuple(SelectOptions.__annotations__)
#: The `cr` of those who look at the choices of layers before there is a budget.
LEAST_CR = 1e-6


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked and normalised options.

    Attributes:
        limits: The fraction to remove of each limited resource.
        memory: The fraction by which the peak of the activation memory has to shrink, or None.
        by_default: Whether the user left the method open.
        target_by_default: Whether the user left the target open, and it is a default one.

    The other fields are the options of `SelectOptions`.
    """

    limits: Mapping[str, float]
    memory: float | None
    method: str
    by_default: bool
    target_by_default: bool
    objective: str
    error_measure: str | None
    exclude: tuple[Any, ...]
    max_slices: int | None
    rank_multiple: int
    target: str | None
    bounds: tuple[Bound, ...]
    latency_table: Any
    quantize: str | None
    schemes: tuple[int, ...] | None

    @classmethod
    def checked(
        cls, cr: Any, given: Mapping[str, Any], *, has_data: bool, caller: str = "select"
    ) -> "Options":
        """Checks `cr`, each option and their combination.

        Args:
            cr: The fraction to remove, or a dict of limits.
            given: Options by their names.
            has_data: Whether there is calibration data.
            caller: The name of the called function, for the error.

        Raises:
            TypeError: If an option's name is unknown.
            ValueError: If a value is invalid (see `SelectOptions`), or options are incompatible.
        """
        check_names(given, caller)
        values = {name: given.get(name, declared(name).default) for name in OPTION_NAMES}
        limits = _limits(cr, values["objective"])
        memory = limits.pop(MEMORY, None)
        values["objective"] = next(iter(limits))
        name = values["method"]
        by_default = name is None
        method = choose_method(name, has_data=has_data, error_measure=values["error_measure"])
        known = get_method(method, values["error_measure"])
        if values["schemes"] is not None:
            values["schemes"] = check_schemes(values["schemes"], known)
        _check_chain(values, known)
        values["target"], target_by_default = _target(values, known)
        for name in ("latency_table", "quantize"):
            if values[name] is not None and values["objective"] != "latency":
                raise ValueError(
                    f"Expected `{name}` only with objective='latency'. Received: "
                    f"{name}={values[name]!r}, objective={values['objective']!r}"
                )
        check_quantize(values["quantize"])
        if values["max_slices"] is not None:
            values["max_slices"] = positive_int(values["max_slices"], "max_slices")
        options = cls(
            **{
                **values,
                "limits": limits,
                "memory": memory,
                "method": method,
                "by_default": by_default,
                "target_by_default": target_by_default,
                "rank_multiple": positive_int(values["rank_multiple"], "rank_multiple"),
                "exclude": check_exclude(values["exclude"]),
                "bounds": check_bounds(values["bounds"]),
            }
        )
        return options

    @property
    def requested(self) -> dict[str, float]:
        """All limits as the user gave them, that of the memory last."""
        return {**self.limits, **({} if self.memory is None else {MEMORY: self.memory})}

    def schemes_of(self, method: Method) -> tuple[int, ...]:
        """The fold schemes to choose from.

        By the weights alone and with many slices, more schemes do harm (docs/results/methods.md).
        """
        if self.schemes is not None:
            return self.schemes
        if method.schemes is not None:
            return method.schemes
        many = self.target is None and self.max_slices != 1
        if method.published or self.error_measure or (many and not method.uses_data):
            return (0,)
        return SCHEMES


def check_names(
    given: Iterable[str], caller: str, more: Iterable[str] = (), leave_out: Iterable[str] = ()
) -> None:
    """Raises a TypeError for unknown option names.

    Args:
        given: The names.
        caller: The name of the called function.
        more: Its other arguments, to suggest in place of a misspelt name.
        leave_out: Options that it does not take.
    """
    known = [name for name in OPTION_NAMES if name not in set(leave_out)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, [*known, *more]) or "."
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{hint}")


def _limits(cr: Any, objective: Any) -> dict[str, float]:
    """The fraction to remove of each limited resource, then of the memory, if it is limited.

    The first one is the objective.
    """
    if not isinstance(objective, str) or objective not in RESOURCES:
        raise ValueError(
            f"Expected `objective` to be one of {', '.join(map(repr, RESOURCES))}. "
            f"Received: objective={objective!r}{did_you_mean(objective, RESOURCES)}"
        )
    limits = cr if isinstance(cr, Mapping) else {objective: cr}
    known = (*JOINT, MEMORY)
    if isinstance(cr, Mapping) and (
        not cr or not set(cr) <= set(known) or objective != declared("objective").default
    ):
        raise ValueError(
            f"Expected the keys of `cr` to be some of {', '.join(map(repr, known))}, and no "
            f"`objective`. Received: cr={dict(cr)!r}, objective={objective!r}"
            f"{did_you_mean(next((key for key in cr if key not in known), None), known)}"
        )
    if [*limits] == [MEMORY]:
        raise ValueError(
            "Expected `cr` to limit 'params' or 'macs' beside 'memory', which removes nothing by "
            f"itself. Received: cr={dict(cr)!r}"
        )
    for name, fraction in limits.items():
        (check_memory if name == MEMORY else check_cr)(fraction)
    return {name: float(limits[name]) for name in (*RESOURCES, MEMORY) if name in limits}


def of_all_forms(options: Mapping[str, Any]) -> Any:
    """Options with the target "size", unless another one is named or latency is measured."""
    objective = options.get("objective", declared("objective").default)
    if options.get("target") is not None or objective not in JOINT:
        return options
    return {**options, "target": SIZE}


def _check_chain(values: Mapping[str, Any], method: Method) -> None:
    """Raises a ValueError if a method's own forms are neither measured nor known to targets."""
    target, objective = values["target"], values["objective"]
    if method.schemes and (target not in (None, SIZE) or objective not in JOINT):
        raise ValueError(
            f"Expected no target and {' or '.join(map(repr, JOINT))} as objective with the method "
            f"{method.name!r}, whose forms targets do not know. Received: target={target!r}, "
            f"objective={objective!r}"
        )


def _target(values: Mapping[str, Any], method: Method) -> tuple[str | None, bool]:
    """The name of the target or None for none, and whether it is the default one."""
    measured_for = RESOURCES[values["objective"]].target
    if values["target"] == SIZE:
        if measured_for is not None:
            raise ValueError(
                f"Expected `target` to name a runtime with objective={values['objective']!r}. "
                f"Received: target={SIZE!r}"
            )
        return None, False
    if values["target"] is not None:
        target = get_target(values["target"])
        return (target.name if target else None), False
    if measured_for is not None:
        return measured_for, False
    limited = values["max_slices"] is not None or values["error_measure"] is not None
    if method.published or limited:
        return None, False
    return CPU, True


def check_schemes(schemes: Any, method: Method) -> tuple[int, ...]:
    """Returns the fold schemes that a method may use, as a sorted tuple.

    Raises:
        ValueError: If they are not 0 to 3, a sequence of them or `"all"`, or if the method has
            only scheme 0.
    """
    if isinstance(schemes, str) and schemes == "all":
        schemes = SCHEMES
    found = (schemes,) if isinstance(schemes, numbers.Integral) else schemes
    if (
        isinstance(found, Iterable)
        and not isinstance(found, str)
        and (items := list(found))
        and all(isinstance(item, numbers.Integral) for item in items)
        and not any(isinstance(item, bool) for item in items)
        and set(items) <= set(SCHEMES)
    ):
        found_schemes = tuple(sorted({int(item) for item in items}))
        if found_schemes != (0,) and not method.folds:
            able = ", ".join(repr(name) for name, known in METHODS.items() if known.folds)
            raise ValueError(
                f"Expected `schemes` to be 0 with the method {method.name!r}. Received: "
                f"schemes={found_schemes}. Leave `schemes` out, or use one of the methods {able}."
            )
        return found_schemes
    raise ValueError(
        f"Expected `schemes` to be 'all', or one or several of {SCHEMES}. "
        f"Received: schemes={schemes!r}"
    )


def check_quantize(quantize: Any) -> None:
    """Raises a ValueError unless the latency of such files can be measured."""
    if quantize not in QUANTIZE:
        raise ValueError(
            f"Expected `quantize` to be None or 'int8', to measure latency. "
            f"Received: quantize={quantize!r}{did_you_mean(quantize, QUANTIZE)}"
        )


def check_cr(cr: Any) -> None:
    """Raises a ValueError unless `cr` is a number strictly between 0 and 1."""
    if not is_fraction(cr):
        raise ValueError(
            "Expected `cr`, the fraction to remove, to be a number with 0 < cr < 1. "
            f"Received: cr={cr!r} of type {type(cr).__name__}"
        )


def check_memory(fraction: Any) -> None:
    """Raises a ValueError unless a limit of the memory is a number from 0 to below 1."""
    number = isinstance(fraction, numbers.Real) and not isinstance(fraction, bool)
    if not number or not 0 <= float(fraction) < 1:
        raise ValueError(
            "Expected `cr['memory']`, the fraction by which the peak of the activation memory "
            "shrinks, to be a number with 0 <= memory < 1, where 0 means that it does not grow. "
            f"Received: {fraction!r} of type {type(fraction).__name__}"
        )


def check_cr_or_plan(
    cr: Any, plan: CompressionPlan | None, given: Mapping[str, Any], caller: str
) -> None:
    """Checks that there is either a `cr`, or a plan without options.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: If both or neither are given, or options beside the plan.
    """
    check_names(given, caller, ("plan", "sequential", "calibration_data"))
    if (cr is None) == (plan is None):
        raise ValueError(
            f"Expected either `cr` or `plan`. Received: cr={cr!r}, "
            f"plan={'a plan' if plan is not None else None}"
        )
    if plan is None:
        return
    check_plan(plan)
    changed = {name: value for name, value in given.items() if not _is_default(name, value)}
    if changed:
        raise ValueError(
            "Expected no options beside `plan`, which already holds the choices. "
            f"Received: {', '.join(f'{name}={value!r}' for name, value in changed.items())}"
        )


def _is_default(name: str, value: Any) -> bool:
    empty = isinstance(value, (list, tuple, dict)) and not value
    return empty or value is None or value == declared(name).default


# -- Signatures, docstrings and flags --------------------------------------------------------------


def takes_options(*, leave_out: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Adds the options to the signature and the docstring of a function with `**options`.

    `help()` and IDEs then show them like ordinary arguments. In the docstring they replace the
    line `{options}`.

    Args:
        leave_out: Options that the function does not take.
    """
    names = [name for name in OPTION_NAMES if name not in leave_out]

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=declared(name).default,
                annotation=SelectOptions.__annotations__[name].__origin__,
            )
            for name in names
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*kept, *added])
        function.__doc__ = documented(function.__doc__, names)
        return function

    return decorate


def documented(docstring: str | None, names: Sequence[str] = OPTION_NAMES) -> str:
    """Replaces the line `{options}` of a docstring by the options' paragraphs."""
    lines = []
    for line in (docstring or "").splitlines():
        if line.strip() != "{options}":
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        for name in names:
            lines += declared(name).paragraph(name, indent)
    return "\n".join(lines)


def add_flags(
    parser: Any, names: Sequence[str], changed: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Adds options to an `argparse` parser, such as `--max-slices` for `max_slices`.

    Args:
        parser: The parser.
        names: The options.
        changed: Arguments for `ArgumentParser.add_argument` that differ from the declared ones.
    """
    for name in names:
        option = declared(name)
        # Values that are added one by one go to a copy of a list.
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        flag = {**(option.flag or {}), **(changed or {}).get(name, {})}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **flag)


def flags(arguments: Any, names: Sequence[str]) -> dict[str, Any]:
    """The values of the flags of `add_flags`, by option."""
    values = {name: getattr(arguments, name) for name in names}
    if values.get("bounds"):
        values["bounds"] = dict(values["bounds"])
    return values
