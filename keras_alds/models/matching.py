"""Pairs the layers of a model with the choices of a plan."""

from __future__ import annotations

from keras_alds.kinds.base import factorized_kind, input_rank_of, is_factorized, scheme_of
from keras_alds.models.inventory import Inventory, LayerRecord, already_compressed
from keras_alds.plan import CompressionPlan, LayerChoice, Skip
from keras_alds.tables import counted

Pairs = list[tuple[LayerRecord, LayerChoice]]


def match(inventory: Inventory, plan: CompressionPlan) -> Pairs:
    """Pairs the layers of a model with the choices of a plan.

    Layers are matched by name, or else by order and shape: names that Keras numbers automatically
    differ between two models made by the same code.

    Raises:
        ValueError: If neither matches.
    """
    records = inventory.records
    by_path = {record.path: record for record in records}
    if len(records) == len(plan.choices):
        for found in ([by_path.get(choice.layer) for choice in plan.choices], records):
            pairs = list(zip(found, plan.choices, strict=True))
            if all(_fits(*pair) for pair in pairs):
                return [(record, choice) for record, choice in pairs if record is not None]
    if factorized := inventory.factorized:
        raise already_compressed(factorized)
    wrong = f"{counted(len(plan.choices), 'layer')}, where the model has {len(records)}"
    padded = [*records, *[None] * len(plan.choices)]
    for record, choice in zip(padded, plan.choices, strict=False):
        if not _fits(record, choice):
            scheme = f" in fold scheme {choice.scheme}" if choice.scheme else ""
            other = "none"
            if record is not None:
                other = f"{record.params} and {record.kernel_shape} in '{record.path}'"
            wrong = (
                f"layer '{choice.layer}' with {choice.params_before} parameters and kernel "
                f"{choice.kernel_shape}{scheme}, where the model has {other}"
            )
            break
    raise ValueError(
        f"Expected a plan made for the model '{inventory.model.name}', or for one of the same "
        f"architecture. Received: a plan for {wrong}. Make a plan for this model with `select`."
    )


def _fits(record: LayerRecord | None, choice: LayerChoice) -> bool:
    if record is None or record.kernel_shape != choice.kernel_shape:
        return False
    kind, layer = record.kind if choice.scheme else None, record.layer
    known = kind is None or choice.scheme in {
        *kind.schemes(layer).values(),
        *kind.chain_schemes(layer).values(),
    }
    return known and record.params == choice.params_before


def is_applied(inventory: Inventory, plan: CompressionPlan) -> bool:
    """Whether the layers of a model are factorized as a plan says."""
    records = inventory.records
    return len(records) == len(plan.choices) and all(map(_is_as_chosen, records, plan.choices))


def _is_as_chosen(record: LayerRecord, choice: LayerChoice) -> bool:
    layer = record.layer
    if not is_factorized(layer):
        return not choice.factorized and record.params == choice.params_before
    if not choice.factorized:
        return choice.reason_code == Skip.FACTORIZED.value
    shape = factorized_kind(layer).folded(layer, 0).shape(layer.kernel_shape)
    found = layer.slices, layer.rank, scheme_of(layer), input_rank_of(layer), shape
    chosen = choice.slices, choice.rank, choice.scheme, choice.input_rank, choice.kernel_shape
    return found == chosen
