"""The kernels of recurrent cells as layers of their own.

A cell holds two kernels as variables, and every step multiplies by both. Everything that is done
to kernels is done to layers, so a `CellKernel` stands for each: the dense layer that it is. It
shares the cell's variable and is called by nothing but `calling_kernels`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_alds import _backend
from keras_alds.kinds.recurrent import KERNELS

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

#: The recurrent layers whose cells have a factorized form, by the names of the stock classes.
RECURRENT = ("GRU", "LSTM", "SimpleRNN")

_KERNELS: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


class CellKernel(_Base):
    """A kernel of a recurrent cell; a subclass adds the `Layer` of a Keras as the last base.

    Args:
        cell: The built cell.
        name: The cell's attribute that is the kernel.
    """

    def __init__(self, cell: Any, name: str) -> None:
        super().__init__(name=name, dtype=getattr(cell, "dtype_policy", None) or cell._dtype_policy)
        self._cell = weakref.ref(cell)
        self.part = name.partition("_")[0]
        self.kernel = getattr(cell, name)
        self.built = True

    @property
    def cell(self) -> Any:
        """The cell."""
        return self._cell()

    @property
    def trainable(self) -> bool:
        """Whether the cell is trained."""
        return bool(self.cell.trainable) if hasattr(self, "_cell") else True

    @property
    def scope(self) -> str:
        """The name scope of the variable, and of the factors in its place."""
        return (getattr(self.kernel, "path", None) or self.kernel.name).partition(":")[0]

    def call(self, inputs: Any) -> Any:
        """Return zeros of the shape of the product, which nobody reads."""
        return inputs[..., :1] * tf.zeros(self.kernel.shape[-1:], inputs.dtype)


@functools.cache
def _kernel_class(base: type, name: str) -> type:
    return type(name, (CellKernel, base), {"__doc__": CellKernel.__doc__})


def is_cell(layer: Any) -> bool:
    """Whether `layer` is a stock recurrent cell, or the factorized form of one."""
    backend = _backend.backend_of(layer)
    return any(
        type(layer) in (getattr(backend.keras.layers, f"{n}Cell"), _cell_class(backend, n))
        for n in RECURRENT
    )


def _cell_class(backend: _backend.Backend, name: str) -> type:
    return backend.factorized_class(f"{name}Cell")


def cell_kernels(cell: Any) -> dict[str, Any]:
    """The kernels that a built cell holds as variables, as layers by their names.

    The same objects are returned as long as the cell holds the same variables. There are none of
    another layer, and none in place of a factorized kernel.
    """
    if not is_cell(cell) or not cell.built:
        return {}
    known = _KERNELS.setdefault(cell, {})
    backend = _backend.backend_of(cell)
    found = {}
    for name in KERNELS:
        variable = getattr(cell, name)
        if isinstance(variable, backend.keras.layers.Layer):
            continue
        if name not in known or known[name].__dict__.get("kernel") is not variable:
            cls = _kernel_class(backend.keras.layers.Layer, type(cell).__name__)
            known[name] = cls(cell, name)
        found[name] = known[name]
    return found


def all_kernels(cell: Any) -> dict[str, Any]:
    """Both kernels of a built cell as layers: factorized ones, and stand-ins for whole ones."""
    whole = cell_kernels(cell)
    if not is_cell(cell) or not cell.built:
        return {}
    return {name: whole.get(name) or getattr(cell, name) for name in KERNELS}


def is_recurrent(layer: Any) -> bool:
    """Whether `layer` runs a cell over time steps, or wraps layers that do."""
    layers = _backend.backend_of(layer).keras.layers
    return isinstance(layer, (layers.RNN, layers.Bidirectional))


def obstacle(kernel: CellKernel, holders: Sequence[Any]) -> str | None:
    """Why a cell's kernel cannot be factorized because of the layers that hold the cell, or None.

    Args:
        kernel: The kernel.
        holders: The recurrent layers around its cell.
    """
    cell = kernel.cell
    if hasattr(cell, "kernels"):
        return "its cell is factorized already"
    layers = _backend.backend_of(cell).keras.layers
    stock = [getattr(layers, name) for name in ("RNN", *RECURRENT)]
    runners = [layer for layer in holders if getattr(layer, "cell", None) is cell]
    others = [layer for layer in runners if type(layer) not in stock]
    if runners and not others:
        return None
    others += [layer.cell for layer in holders if hasattr(layer, "cell")]
    name = type(others[0]).__name__ if others else "no recurrent layer"
    return f"its cell is run by {name}, whose steps cannot be followed"


def cells(layer: Any) -> list[Any]:
    """The cells of LSTM, GRU and SimpleRNN layers that a layer is or wraps, in order."""
    if is_cell(layer):
        return [layer]
    children = _backend.backend_of(layer).children(layer)
    return [cell for child in children for cell in cells(child)]


def holds_factorized(layer: Any) -> bool:
    """Whether a recurrent layer, or a `Bidirectional`, has factorized kernels in its cells."""
    if not is_recurrent(layer):
        return False
    return any(bool(getattr(cell, "kernels", None)) for cell in cells(layer))


def stock_config(layer: Any) -> dict[str, Any]:
    """The name and the config of the stock layer that a recurrent layer stands for."""
    return _stock({"class_name": type(layer).__name__, "config": layer.get_config()})


def _stock(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_stock(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _stock(item) for key, item in value.items()}
    name = str(value.get("class_name", "")).rpartition(">")[2]
    if not name.startswith("Factorized"):
        return value
    config = {key: item for key, item in value["config"].items() if key != "kernels"}
    stock = {"class_name": name.removeprefix("Factorized"), "config": config}
    return {"module": "keras.layers", "registered_name": None, **stock}


# -- What the kernels are called on ----------------------------------------------------------------


@contextlib.contextmanager
def calling_kernels(model: Any, kernels: Iterable[Any], *, values: bool = True) -> Iterator[None]:
    """Lets recurrent layers call their kernels as layers, on all time steps at once, while inside.

    So whoever watches the calls of layers sees what the kernels are multiplied by. Steps that a
    mask takes out are left out. Stateful layers have their states back afterwards.

    Args:
        model: The model that holds the recurrent layers.
        kernels: The kernels, as `all_kernels` has them. Others that are no such kernels may be
            among them.
        values: Whether the values matter, and not only the shapes. Defaults to True.
    """
    wanted = {id(kernel) for kernel in kernels}
    found: dict[int, tuple[Any, dict[str, Any]]] = {}
    backend = _backend.backend_of(model)

    def visit(parent: Any) -> None:
        for layer in backend.children(parent):
            cell = getattr(layer, "cell", None)
            if isinstance(layer, backend.keras.layers.RNN) and is_cell(cell):
                own = {n: k for n, k in all_kernels(cell).items() if id(k) in wanted}
                if own:
                    found[id(layer)] = (layer, own)
            visit(layer)

    visit(model)
    layers = [layer for layer, _ in found.values()]
    before = [(layer, layer.__dict__.get("call"), _states(layer)) for layer in layers]
    try:
        for layer, own in found.values():
            layer.__dict__["call"] = _calling(layer, own, values)
        yield
    finally:
        for layer, call, states in before:
            layer.__dict__.pop("call", None)
            if call is not None:
                layer.__dict__["call"] = call
            _restore(layer, states)


def _calling(layer: Any, kernels: dict[str, Any], values: bool) -> Callable[..., Any]:
    call = layer.call
    signature = inspect.signature(call)

    @functools.wraps(call)
    def inner(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        x, *initial = _as_list(next(iter(given.values())))
        initial = _as_list(given.get("initial_state")) or initial
        mask = given.get("mask")
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        steps = {"kernel": None, "recurrent_kernel": None}  # which ones are made
        if values and mask is not None:
            mask = tf.cast(tf.convert_to_tensor(mask), tf.bool)
            made = tf.reverse(mask, [_time_axis(layer)]) if layer.go_backwards else mask
            steps = {"kernel": mask, "recurrent_kernel": made}
        x = tf.cast(tf.convert_to_tensor(x), layer.compute_dtype)
        seen = {"kernel": x}
        if "recurrent_kernel" in kernels:
            if values:
                made = steps["recurrent_kernel"]
                seen["recurrent_kernel"] = _hidden(layer, call, args, kwargs, initial, made)
            else:
                seen["recurrent_kernel"] = x[..., :1] * tf.zeros([layer.cell.units], x.dtype)
        outputs = call(*args, **kwargs)
        for name, kernel in kernels.items():
            rows = seen[name]
            if steps[name] is not None:
                rows = tf.boolean_mask(rows, steps[name])
            if rows.shape.rank and rows.shape[0] != 0:
                kernel.call(rows)
        return outputs

    return inner


def _hidden(
    layer: Any, call: Callable[..., Any], args: Any, kwargs: Any, initial: list[Any], made: Any
) -> Any:
    """The hidden states that all steps of a call begin with; `made` says which steps are made."""
    states = _states(layer)
    flags = {"return_sequences": True, "return_state": False, "zero_output_for_mask": False}
    flags = {name: value for name, value in flags.items() if name in layer.__dict__}
    before = {name: layer.__dict__[name] for name in flags}
    try:
        layer.__dict__.update(flags)
        after = call(*args, **kwargs)
    finally:
        layer.__dict__.update(before)
        _restore(layer, states)
    axis = _time_axis(layer)
    steps = tf.unstack(tf.shape(after))
    steps[axis] -= 1
    first = (initial or states or [None])[0]
    if first is None:
        first = tf.zeros_like(tf.gather(after, 0, axis=axis))
    first = tf.expand_dims(tf.cast(first, after.dtype), axis)
    states = tf.concat([first, tf.slice(after, [0, 0, 0], tf.stack(steps))], axis)
    if made is None:
        return states
    # Until the first one is made, the outputs are zeros, whatever the state is.
    begun = tf.cumsum(tf.cast(made, tf.int32), axis, exclusive=True) > 0
    return tf.where(begun[..., None], states, first)


def _time_axis(layer: Any) -> int:
    return 0 if getattr(layer, "time_major", False) else 1


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _states(layer: Any) -> list[Any]:
    """The values of a stateful layer's states; none of another layer."""
    if not layer.stateful or layer.states is None:
        return []
    known = [state for state in tf.nest.flatten(layer.states) if state is not None]
    return [tf.identity(tf.convert_to_tensor(state)) for state in known]


def _restore(layer: Any, states: list[Any]) -> None:
    if states:
        for state, value in zip(tf.nest.flatten(layer.states), states, strict=True):
            state.assign(value)


# -- Kernels that are factorized -------------------------------------------------------------------


@contextlib.contextmanager
def holding(pairs: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Lets cells multiply by what the factors of their kernels stand for while inside.

    Args:
        pairs: Kernels with the factorized layers that they are to become.
    """
    before = []
    try:
        for kernel, factorized in pairs:
            before.append((kernel.kernel, tf.identity(tf.convert_to_tensor(kernel.kernel))))
            kernel.kernel.assign(factorized.kernel)
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def adopt_cells(backend: _backend.Backend, layers: Sequence[Any]) -> list[Callable[[], None]]:
    """Gives the factorized kernels of cells to the cells, and makes their layers such as save them.

    Args:
        backend: The backend of the layers.
        layers: All layers of a model, in the order in which they are walked through.

    Returns:
        Functions that put everything back.
    """
    undo: list[Callable[[], None]] = []
    changed = set()
    try:
        for cell in layers:
            factorized = {
                name: kernel
                for name, kernel in _KERNELS.get(cell, {}).items()
                if hasattr(kernel, "encoder_form")
            }
            if factorized and not hasattr(cell, "kernels"):
                undo += [_adopt_cell(backend, cell, factorized)]
                changed.add(id(cell))
        for layer in layers:
            if is_recurrent(layer) and id(getattr(layer, "cell", None)) in changed:
                stock = [getattr(backend.keras.layers, name) for name in RECURRENT]
                if type(layer) in stock:
                    cls = backend.factorized_class(type(layer).__name__)
                    undo += [backend.adopt(layer, cls, {})]
        for layer in layers:
            if isinstance(layer, backend.keras.layers.Bidirectional) and any(
                id(getattr(inner, "cell", None)) in changed for inner in backend.children(layer)
            ):
                undo += [backend.renew_bidirectional(layer)]
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return undo


def _adopt_cell(
    backend: _backend.Backend, cell: Any, kernels: dict[str, Any]
) -> Callable[[], None]:
    cls: Any = backend.factorized_class(type(cell).__name__)
    found = {name: {"slices": k.slices, "rank": k.rank} for name, k in kernels.items()}
    new = cls.from_config({**cell.get_config(), "kernels": found})
    for name in ("implementation", "dropout_mask_count"):  # not in every config
        if name in cell.__dict__:
            setattr(new, name, cell.__dict__[name])
    new.build((None, int(cell.kernel.shape[0])))
    for name, kernel in kernels.items():
        backend.transplant(getattr(new, name), kernel)
    if hasattr(cell, "seed_generator"):
        new.seed_generator.state.assign(cell.seed_generator.state)
    kept = [name for name in (*KERNELS, "bias") if name not in kernels]
    return backend.transplant(cell, new, {name: name for name in kept})
