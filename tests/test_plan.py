"""Plans: their files, and the budget that keeps a promise."""

from __future__ import annotations

import json

import numpy as np
import pytest

from keras_alds import CompressionPlan, compress, select
from keras_alds.resources import allowed_after, removed_fraction


def other_scheme(plan):
    data = plan.to_dict()
    for choice in data["choices"]:
        choice["scheme"] = 6
    return data


def test_plan_files(small, tmp_path):
    path = tmp_path / "plan.json"
    for text, message in (
        ("{", "not JSON"),
        ("[]", "Expected the JSON of a keras_alds compression plan"),
        ('{"format": "keras_alds.CompressionPlan", "version": 99}', "of version 2"),
        ('{"format": "keras_alds.CompressionPlan", "version": 2}', "other fields"),
        (json.dumps({**select(small, 0.4).to_dict(), "costs": [1]}), "other fields"),
        (json.dumps(other_scheme(select(small, 0.4))), "the fold schemes of a plan"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            CompressionPlan.load(path)
    path.write_bytes(b"PK\x94")
    with pytest.raises(ValueError, match=r"plan\.json'\. Received: a file that is not JSON"):
        CompressionPlan.load(path)


@pytest.mark.parametrize("before", [1, 7, 1000, 271_098, 10**12 + 7])
def test_the_budget_is_the_largest_that_keeps_the_promise(before):
    for cr in np.random.default_rng(0).uniform(1e-3, 1 - 1e-3, 200):
        after = allowed_after(before, cr)
        assert removed_fraction(before, after) >= cr
        assert removed_fraction(before, after + 1) < cr


def test_of_nothing_nothing_can_be_removed(keras_module):
    assert (removed_fraction(0, 0), allowed_after(0, 0.5), allowed_after(0, 0.0)) == (0, -1, 0)
    layers = keras_module.layers
    table = keras_module.Sequential([layers.Input((4,)), layers.Embedding(90, 24)])
    with pytest.raises(ValueError, match="is not reachable"):
        select(table, 0.4, objective="macs")


def test_rows_have_both_ranks_of_tucker(small):
    plan = select(small, 0.3, method="tucker")
    found = [row["input_rank"] for row in plan.to_rows()]
    assert found == [choice.input_rank for choice in plan.choices]
    assert any(found)


def test_errors_print_shortly_what_they_got(small):
    plan = select(small, 0.4)
    for call in (
        lambda: compress(small, plan=plan.to_dict()),
        lambda: compress([np.zeros(3).tolist()] * 1000, plan=plan),
    ):
        with pytest.raises(ValueError, match="Received: ") as info:
            call()
        assert len(str(info.value)) < 1000


def test_plans_and_choices_print_shortly(small):
    plan = select(small, 0.4)
    assert len(repr(plan)) < 200
    assert f"removes {plan.cr:.2%} of params; {len(plan.factorized)} of 5 layers" in repr(plan)
    texts = {choice.layer: repr(choice) for choice in plan.choices}
    assert max(map(len, texts.values())) < 160
    assert texts["bn"].endswith("skipped: BatchNormalization has no kernel to factorize>")
    (down,) = (choice for choice in plan.choices if choice.layer == "down")
    assert f"slices={down.slices}, rank={down.rank}, " in texts["down"]


def test_the_summary_shows_factorized_layers_and_a_line_for_every_reason(small):
    plan = select(small, 0.1, exclude=["stem", "hidden", "head"], max_slices=1)
    printed = []
    plan.summary(printed.append)
    plan.summary(printed.append, show_skipped=True)
    short, long = printed
    assert max(map(len, [*short.splitlines(), *long.splitlines()])) <= 100
    rows = [[line for line in text.splitlines() if line.startswith("| ")][1:] for text in printed]
    assert [row.split()[1] for row in rows[0]] == ["down"]
    assert [row.split()[1] for row in rows[1]] == ["stem", "down", "hidden", "head"]
    assert "excluded |" in rows[1][0]
    for text in printed:
        text = " ".join(text.split())
        assert "Skipped (excluded): 3 layers, " in text
        assert "(stem, hidden, head): excluded by exclude=…" in text
