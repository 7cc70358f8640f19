"""Lists that a user's code keeps beside the weights of a model, such as accumulated gradients."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend.live import variables_of
from keras_alds.models.inventory import LayerRecord, has_weights

Shape = tuple[Any, ...]
Shapes = tuple[Shape, ...]
# So many lists are looked at in a list, such as one of each epoch.
_MOST_LISTS = 100


def own_lists(
    model: Any, part: Any, callbacks: Sequence[Any], records: Iterable[LayerRecord]
) -> Iterator[tuple[str, str]]:
    """The lists with an entry for each weight of a model, of which some will be factorized.

    Yields:
        The name of such a list, tuple or dict, and the name of the model that it follows.
    """
    backend = _backend.backend_of(model)
    models = {id(m): m for m in (model, part, *(getattr(model, n) for n in backend.parts(model)))}
    replaced = {id(v) for record in records for v in variables_of(record.layer)}
    followed: dict[Shapes, str] = {}
    for each in filter(has_weights, models.values()):
        for weights in (each.trainable_weights, each.weights):
            if len(weights) > 1 and any(id(v) in replaced for v in weights):
                followed.setdefault(tuple(tuple(v.shape) for v in weights), each.name)
    owners = {id(owner): (owner, backend.attributes(owner)) for owner in (model, part)}
    owners |= {id(c): (c, backend.own_attributes(c)) for c in callbacks}
    lengths = {len(shapes) for shapes in followed}
    for owner, attributes in owners.values():
        for name, value in attributes:
            shapes = next((s for s in _shapes(value, lengths) if s in followed), None)
            if shapes is not None:
                yield f"{type(owner).__name__}.{name}", followed[shapes]


def _shapes(value: Any, lengths: Container[int], inside: bool = False) -> Iterator[Shapes]:
    """The shapes of the entries of a list, and of lists in it, as one of each epoch's weights.

    Those of other lengths are left out: they may be long.
    """
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return
    if len(value) in lengths:
        yield tuple(map(_shape, value))
    if not inside:
        for item in value[:_MOST_LISTS]:
            yield from _shapes(item, lengths, inside=True)


def _shape(item: Any) -> Shape:
    try:
        return tuple(item.shape)
    except (AttributeError, TypeError, ValueError):  # no array, or of an unknown rank
        return (None,)
