"""Joint budgets and per-layer bounds: `cr={…}` and `bounds=`, in Keras 3 and tf_keras."""

from __future__ import annotations

import re
import warnings

import keras
import numpy as np
import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_alds
from keras_alds import CompressionPlan, compress, count_macs, select
from keras_alds.methods import METHODS
from keras_alds.models import choices
from keras_alds.resources import removed_fraction

WITHOUT_DATA = [
    name for name, method in METHODS.items() if not (method.needs_data or method.synthetic)
]


@pytest.fixture
def keras_module():
    """Keras 3: nothing here depends on which Keras a model is of."""
    return keras


@pytest.fixture
def model(keras_module):
    keras_module.utils.set_random_seed(0)
    return zoo.functional(keras_module)


def removed(choice):
    return removed_fraction(choice.params_before, choice.params_after)


class TestWhatIsOutOfReach:
    """The error says which layers hold what cannot be removed, and why."""

    def test_of_a_quantized_model(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of every layer that it cannot quantize
            model.quantize("int8")
        with pytest.raises(ValueError, match=r"not reachable .*'hidden' and 1 more .*quantized"):
            select(model, 0.9)
        layers = [keras.Input((16,)), keras.layers.Dense(24)]
        dense = keras.Sequential(layers)
        dense.quantize("int8")
        with pytest.raises(ValueError, match=r"Received: none \('dense.*' .*quantized \(int8\)"):
            select(dense, 0.5)

    def test_of_a_model_with_lora(self, model):
        model.get_layer("hidden").enable_lora(2)
        with pytest.raises(ValueError, match=r"not reachable .*'hidden' \(.*\): LoRA is enabled"):
            select(model, 0.9)

    def test_of_a_model_with_lora_that_is_merged_as_the_reason_says(self, tmp_path):
        def make():
            L = keras.layers
            return keras.Sequential(
                [
                    keras.Input((8, 8, 16)),
                    L.Conv2D(32, 3, name="conv"),
                    L.EinsumDense("abcd,de->abce", (6, 6, 48), name="einsum"),
                    L.Dense(48, name="dense"),
                ]
            )

        adapted, merged = make(), make()
        for layer in adapted.layers:
            layer.enable_lora(2)
            for weight in layer.trainable_weights:
                weight.assign(np.random.default_rng(0).normal(scale=0.1, size=weight.shape))
        adapted.save_weights(tmp_path / "merged.weights.h5")
        merged.load_weights(tmp_path / "merged.weights.h5")
        x = np.random.default_rng(0).normal(size=(2, 8, 8, 16)).astype("float32")
        np.testing.assert_allclose(adapted(x), merged(x), rtol=1e-4, atol=1e-4)
        assert len(select(merged, 0.3, method="energy").factorized) > 0

    @pytest.mark.parametrize("objective", ["params", "macs"])
    def test_by_size(self, model, objective):
        with pytest.raises(ValueError, match=r"Skipped: 'down' \(.*='down'; 'stem' \(.*='stem'"):
            select(model, 0.9, objective=objective, exclude=["stem", "down"])


class TestTwoLimits:
    @pytest.mark.parametrize("limits", [{"params": 0.5, "macs": 0.3}, {"params": 0.2, "macs": 0.5}])
    def test_both_are_kept(self, model, limits, tmp_path):
        plan = select(model, limits)
        small = compress(model, limits)
        params = removed_fraction(model.count_params(), small.count_params())
        macs = removed_fraction(count_macs(model), count_macs(small))
        assert params == plan.cr == plan.reduction("params") >= limits["params"]
        assert macs == plan.reduction("macs") >= limits["macs"]
        assert plan.requested == limits
        assert plan.objective == "params"
        plan.save(tmp_path / "plan.json")
        assert CompressionPlan.load(tmp_path / "plan.json") == plan
        assert hash(plan) == hash(CompressionPlan.load(tmp_path / "plan.json"))
        lines = []
        plan.summary(print_fn=lines.append)
        assert f"{limits['macs']:g} of macs requested" in lines[0]

    def test_every_method_keeps_them(self, model):
        x = zoo.images(16)[0]
        stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
        for name, method in METHODS.items():
            if method.synthetic:
                continue  # its BatchNormalization is not trained
            data = stats if method.needs_data else None
            plan = select(model, {"params": 0.3, "macs": 0.4}, method=name, calibration_data=data)
            assert plan.cr >= 0.3, name
            assert plan.reduction("macs") >= 0.4, name
            small = compress(model, plan=plan, calibration_data=data)
            assert small.count_params() == plan.params_after
            assert count_macs(small) == plan.costs["macs"].after

    def test_one_limit_is_a_plain_ratio(self, model):
        assert select(model, {"params": 0.4}) == select(model, 0.4)
        assert select(model, {"macs": 0.4}) == select(model, 0.4, objective="macs")

    def test_in_fit(self, model, keras_module):
        x, y = zoo.images(32)
        loss = keras_module.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer="sgd", loss=loss)
        params, macs = model.count_params(), count_macs(model)
        callback = keras_alds.ALDSCompress(cr={"params": 0.4, "macs": 0.4}, verbose=0, at_epoch=0)
        model.fit(x, y, epochs=1, callbacks=[callback], verbose=0)
        assert removed_fraction(params, model.count_params()) >= 0.4
        assert removed_fraction(macs, count_macs(model)) >= 0.4

    def test_the_error_says_which_limit_is_out_of_reach(self, model):
        with pytest.raises(ValueError, match=r"cr=0\.99 is not.*objective='macs': expected 0 < cr"):
            select(model, {"params": 0.3, "macs": 0.99})
        with pytest.raises(ValueError, match=r"cr=0\.99 is not.*objective='params'") as info:
            select(model, {"params": 0.99, "macs": 0.3})
        most = float(re.search(r"cr <= ([\d.]+),", str(info.value)).group(1))
        assert select(model, {"params": most, "macs": 0.3}, max_slices=1).cr >= most

    @pytest.mark.parametrize(
        "limits", [{}, {"bytes": 0.5}, {"params": 0.5, "macs": 0.5, "milliseconds": 0.5}]
    )
    def test_unknown_limits(self, model, limits):
        with pytest.raises(ValueError, match=r"keys of `cr` to be some of 'params', 'macs'"):
            select(model, limits)

    def test_one_scheme_of_a_strided_layer(self, model):
        """Strides order parameters and MACs differently."""
        for scheme in (1, 3):
            plan = select(model, {"params": 0.1, "macs": 0.1}, schemes=scheme, target="size")
            assert min(plan.reduction("params"), plan.reduction("macs")) >= 0.1

    def test_bad_fractions_and_an_objective_beside(self, model):
        with pytest.raises(ValueError, match=r"0 < cr < 1.*Received: cr=2"):
            select(model, {"params": 0.5, "macs": 2})
        with pytest.raises(ValueError, match=r"no `objective`.*Received: .*objective='macs'"):
            select(model, {"params": 0.5, "macs": 0.5}, objective="macs")


class TestBounds:
    def test_are_kept_by_every_method(self, model):
        x = zoo.images(16)[0]
        stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
        bounds = {"down": (0.55, 0.7), r"hid.*": (None, 0.2)}
        for name, method in METHODS.items():
            if method.synthetic:
                continue  # its BatchNormalization is not trained
            data = stats if method.needs_data else None
            for objective in ("params", "macs"):
                plan = select(
                    model, 0.3, method=name, objective=objective, bounds=bounds,
                    calibration_data=data,
                )  # fmt: skip
                choices = {choice.layer: choice for choice in plan.choices}
                assert 0.55 <= removed(choices["down"]) <= 0.7, (name, objective)
                assert removed(choices["hidden"]) <= 0.2, (name, objective)
                small = compress(model, plan=plan, calibration_data=data)
                layer = small.get_layer("down")
                assert layer.count_params() == choices["down"].params_after

    def test_change_what_is_chosen(self, model, keras_module):
        plan = select(model, 0.3, target="size")
        free = {choice.layer: removed(choice) for choice in plan.choices}
        assert free["down"] > 0.3
        bounds = {keras_module.layers.Conv2D: (None, 0.3)}
        plan = select(model, 0.3, bounds=bounds, target="size")
        for choice in plan.choices:
            assert choice.kind != "Conv2D" or removed(choice) <= 0.3
        assert plan.cr >= 0.3
        unbound = select(model, 0.4, bounds={re.compile("."): (None, None)}, target="size")
        assert unbound == select(model, 0.4, target="size")

    def test_all_entries_for_a_layer_hold(self, model):
        plan = select(model, 0.3, bounds={"down": (0.5, None), r"d.*": (None, 0.6)})
        (choice,) = [choice for choice in plan.choices if choice.layer == "down"]
        assert 0.5 <= removed(choice) <= 0.6
        with pytest.raises(ValueError, match=r"of layer 'down' to allow one.*\(0\.7, 0\.6"):
            select(model, 0.3, bounds={"down": (0.7, None), r"d.*": (None, 0.6)})

    def test_in_fit_and_compress(self, model, keras_module):
        bounds = {"down": (None, 0.3)}
        small = compress(model, 0.2, bounds=bounds)
        x, y = zoo.images(32)
        loss = keras_module.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer="sgd", loss=loss)
        callback = keras_alds.ALDSCompress(cr=0.2, bounds=bounds, verbose=0, at_epoch=0)
        model.fit(x, y, epochs=1, callbacks=[callback], verbose=0)
        assert model.count_params() == small.count_params()
        plan = callback.plan
        assert max(removed(choice) for choice in plan.choices if choice.layer == "down") <= 0.3

    def test_ceilings_count_for_what_is_reachable(self, model):
        bounds = {"down": (None, 0.1)}
        with pytest.raises(
            ValueError, match=r"is not reachable.*rank_multiple=1, bounds\)"
        ) as info:
            select(model, 0.6, bounds=bounds)
        most = float(re.search(r"cr <= ([\d.]+),", str(info.value)).group(1))
        assert select(model, most, bounds=bounds, max_slices=1).cr >= most

    def test_no_choice_within(self, model):
        with pytest.raises(ValueError, match="nearest fractions of its parameters") as info:
            select(model, 0.2, bounds={"down": (0.301, 0.302)})
        low, high = map(float, re.findall(r"\d\.\d{4}", str(info.value)))
        assert low < 0.301 < 0.302 < high
        for fraction in (low, high):
            bounds = {"down": (fraction - 1e-4, fraction + 1e-4)}
            choices = select(model, 0.2, bounds=bounds).choices
            (choice,) = [choice for choice in choices if choice.layer == "down"]
            assert removed(choice) == pytest.approx(fraction, abs=1e-4)

    def test_entries_that_match_nothing_warn(self, model):
        with pytest.warns(UserWarning, match=r"`bounds` entry 'nothing' matches no layer"):
            select(model, 0.2, bounds={"nothing": (0.1, 0.2)})
        with pytest.warns(UserWarning, match=r"that can be factorized\. Did you mean 'stem'\?"):
            select(model, 0.2, bounds={"Steem": (0.1, 0.2)})
        with pytest.warns(UserWarning, match=r"`bounds` entry 'bn' .* that can be factorized"):
            select(model, 0.2, bounds={"bn": (0.1, 0.2)})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            select(model, 0.2, bounds={"stem": (None, 0.2)})

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ([("down", 0.1)], r"`bounds` to be a dict.*Received: bounds="),
            ({"down": 0.5}, r"\(least, greatest\) with.*Received: 'down': 0.5"),
            ({"down": (0.5, 0.4)}, r"Received: 'down': \(0.5, 0.4\)"),
            ({"down": (0.5, 1.4)}, r"Received: 'down'"),
            ({"down": ("a", None)}, r"Received: 'down'"),
            ({"(": (0.1, 0.2)}, r"string in `bounds` to be a layer's name"),
            ({5: (0.1, 0.2)}, r"Expected `bounds` to hold layer names"),
        ],
    )
    def test_bad_bounds(self, model, bounds, message):
        with pytest.raises(ValueError, match=message):
            select(model, 0.3, bounds=bounds)
        with pytest.raises(ValueError, match="no options beside `plan`"):
            compress(model, plan=select(model, 0.3), bounds={"down": (None, 0.5)})


MODEL = []


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    method=st.sampled_from(WITHOUT_DATA),
    params=st.floats(0.01, 0.95),
    macs=st.floats(0.01, 0.95),
    ceiling=st.floats(0.0, 1.0),
    floor=st.floats(0.0, 1.0),
)
def test_limits_and_bounds_hold_or_are_refused(method, params, macs, ceiling, floor):
    import keras

    if not MODEL:
        keras.utils.set_random_seed(0)
        MODEL.append(zoo.functional(keras))
    bounds = {"down": (None, ceiling), "hidden": (floor, None)}
    try:
        plan = select(MODEL[0], {"params": params, "macs": macs}, method=method, bounds=bounds)
    except ValueError as error:
        if not re.search("is not reachable|to allow one of its choices", str(error)):
            raise
        return
    assert plan.cr >= params
    assert plan.reduction("macs") >= macs
    fractions = {choice.layer: removed(choice) for choice in plan.choices}
    assert fractions["down"] <= ceiling
    assert fractions["hidden"] >= floor
    assert np.isfinite(plan.max_error)


def alike(plan, other):
    """The same choices; the last bits of errors depend on where BLAS finds its arrays."""
    for ours, theirs in zip(plan.choices, other.choices, strict=True):
        assert (ours.layer, ours.slices, ours.rank) == (theirs.layer, theirs.slices, theirs.rank)
        assert ours.error == pytest.approx(theirs.error, rel=1e-9, abs=1e-12)


def test_only_the_spectra_of_allowed_slices_are_computed(monkeypatch):
    model = zoo.functional(keras)
    found = []

    def spy(kernels, *, slices):
        found.append((len(kernels), set(slices)))
        return spectra_many(kernels, slices=slices)

    spectra_many = choices.spectra_many
    options = {"method": "energy", "schemes": 0}
    monkeypatch.setattr(choices, "spectra_many", spy)
    narrow = select(model, 0.4, max_slices=1, **options)
    assert found[-1] == (4, {1})
    free = select(model, 0.4, target="size", **options)
    assert found[-1][0] > 0
    assert {1, 2} < found[-1][1]
    alike(select(model, 0.4, max_slices=1, **options), narrow)
    alike(select(model, 0.4, target="size", **options), free)
    assert found[-1][0] == 0
