"""The peak of the activation memory: of a model, of a plan, and as a limit."""

from __future__ import annotations

import re
import warnings
from types import ModuleType
from typing import Any

import keras
import pytest
import zoo

import keras_alds
from keras_alds import CompressionPlan, compress, select
from keras_alds.models.inventory import Inventory
from keras_alds.models.memory import Memory, peak_entries

LIMITS = {"params": 0.4, "memory": 0.0}
#: Forms with many hidden channels, chosen by the weights alone.
THIN = {"method": "alds"}


def chain(K: ModuleType) -> Any:
    """The second convolution has the peak, and BatchNormalization twice an operator of its own."""
    L = K.layers
    return K.Sequential(
        [
            K.Input((8, 8, 4)),
            L.Conv2D(8, 3, padding="same", activation="relu", name="first"),
            L.BatchNormalization(name="scaled"),
            L.Conv2D(16, 3, padding="same", use_bias=False, name="second"),
            L.BatchNormalization(name="folded"),
            L.ReLU(),
            L.Dropout(0.5),
            L.Conv2D(8, 3, strides=2, activation="silu", name="third"),
            L.Flatten(),
            L.Dense(4, name="head"),
        ]
    )


def peak(model: Any) -> int | None:
    return peak_entries(Inventory.of(model))


def without_warnings(call: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def test_the_peak_of_a_model(keras_module: ModuleType):
    """Counted by hand: what is live while the operators of the chain run, in entries."""
    L = keras_module.layers
    model = chain(keras_module)
    assert peak(model) == 64 * (8 + 16)  # the input and the output of `second`
    x = inputs = keras_module.Input((6, 6, 4))
    x = L.SeparableConv2D(8, 3, padding="same", depth_multiplier=3)(x)
    assert peak(keras_module.Model(inputs, x)) == 36 * (12 + 8)
    x = L.Add()([inputs, L.Conv2D(4, 1)(L.BatchNormalization()(inputs))])
    # The scaled input is a product and a sum, and the input stays for the Add.
    assert peak(keras_module.Model(inputs, x)) == 36 * 12
    x = L.Conv2D(2, 1)(L.Activation("silu")(inputs))  # x, σ(x), x · σ(x)
    assert peak(keras_module.Model(inputs, x)) == 36 * 12
    x = L.Conv2D(16, 1, activation=L.LeakyReLU())(inputs)  # an operator of its own
    assert peak(keras_module.Model(inputs, x)) == 36 * 32
    x = L.DepthwiseConv2D(3, strides=2)(L.ZeroPadding2D(((0, 1), (0, 1)))(inputs))
    assert peak(keras_module.Model(inputs, x)) == 36 * 4 + 9 * 4
    x = L.DepthwiseConv2D(3, strides=2)(L.ZeroPadding2D(1)(inputs))
    assert peak(keras_module.Model(inputs, x)) == 36 * 4 + 64 * 4
    inputs = keras_module.Input((None, 6, 4))
    assert peak(keras_module.Model(inputs, L.Conv2D(4, 3)(inputs))) is None


def test_models_of_every_kind_keep_the_limit(model: Any):
    """What the plan predicts is the peak of the compressed model, and it is no larger."""
    before = peak(model)
    if before is None:  # a subclassed model, or a loop
        with pytest.raises(ValueError, match="Functional or Sequential model whose feature maps"):
            select(model, LIMITS)
        plan = select(model, 0.4, **THIN)
        assert plan.memory is None
        with pytest.raises(ValueError, match="a plan that knows the memory"):
            plan.reduction("memory")
        return
    plan = select(model, LIMITS, **THIN)
    small = compress(model, plan=plan)
    assert plan.memory == (before, peak(small))
    assert plan.memory.after <= before
    assert plan.cr >= 0.4
    free = select(model, 0.4, **THIN)
    if free.memory is not None:  # known without a trace
        assert free.memory == (before, peak(compress(model, plan=free)))


def test_only_choices_that_exceed_the_limit_are_forbidden(keras_module: ModuleType):
    model = chain(keras_module)
    inventory = Inventory.of(model)
    memory = Memory.of(inventory)
    assert memory.peak == peak(model)
    found = 0
    for record in inventory.candidates:
        for scheme in sorted(set(record.kind.schemes(record.layer).values())):
            most = memory.within(record.layer, scheme, 1, range(1, 99999), memory.peak)[-1]
            assert memory.factorized(record.layer, (scheme, 1, most)) <= memory.peak
            assert memory.factorized(record.layer, (scheme, 1, most + 1)) > memory.peak
            found += 1
    assert found > 6
    # `second` reads 8 channels and writes 16: 16 hidden channels between them are no more.
    second = model.get_layer("second")
    assert memory.within(second, 0, 4, range(1, 9), memory.peak) == range(1, 3)
    # Along the height the encoder of `third` keeps the input's 8 rows and writes 3 columns.
    third = model.get_layer("third")
    assert memory.factorized(third, (1, 1, 5)) == 64 * 16 + 8 * 3 * 5


def test_the_limit_binds_and_is_kept_beside_others(tmp_path: Any):
    keras.utils.set_random_seed(0)
    model = chain(keras)
    free = select(model, 0.5, **THIN)
    assert free.memory.after > free.memory.before
    limits = {"params": 0.5, "macs": 0.3, "memory": 0.0}
    plan = select(model, limits, **THIN)
    assert plan.memory.after <= plan.memory.before
    assert plan.reduction("memory") >= 0
    assert min(plan.cr, plan.reduction("macs")) >= 0.3
    assert plan.requested == limits
    assert plan.objective == "params"
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    lines = []
    free.summary(print_fn=lines.append)
    assert re.search(
        r"Peak activation memory, kB: 1\.5 → \d+\.\d in int8, 6\.1 .*added\)", lines[0]
    )
    report = keras_alds.report(model, compress(model, plan=free))
    assert report.rows["bytes of activations, peak"] == tuple(4 * n for n in free.memory)
    # A compressed model that grew is compressed anew, although it has few parameters.
    again = compress(compress(model, plan=free), LIMITS, **THIN)
    assert peak(again) <= peak(model)
    with pytest.warns(UserWarning, match=r"already compressed to params=0\.5\d, memory=0\.\d"):
        compress(compress(model, plan=plan), LIMITS, **THIN)


def test_a_layer_that_is_too_large_as_it_is_has_to_be_factorized():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(32, 3, padding="same", name=f"conv{n}") for n in range(3)]
    wide = keras.Sequential([keras.Input((8, 8, 16)), *layers, keras.layers.Flatten()])
    limits = {"params": 0.01, "memory": 0.2}
    assert select(wide, limits["params"], **THIN).memory.removed < 0.2
    plan = select(wide, limits, **THIN)
    assert plan.memory.removed >= 0.2
    assert [choice.layer for choice in plan.factorized] == ["conv1", "conv2"]
    assert peak(compress(wide, plan=plan)) == plan.memory.after
    with pytest.raises(ValueError, match="'conv1' to have a choice within all limits"):
        select(wide, limits, bounds={"conv1": (None, 0.0)}, **THIN)
    with pytest.raises(ValueError, match=r"memory=0\.2 is not reachable .* layer 'conv1' runs"):
        select(wide, limits, exclude="conv1", **THIN)


def test_what_is_out_of_reach():
    model = chain(keras)
    with pytest.raises(ValueError, match="expected 0 <= memory <= 0") as info:
        select(model, {"params": 0.4, "memory": 0.4}, exclude=["second"], **THIN)
    assert "1,536 entries are live while layer 'second' runs" in str(info.value)
    with pytest.raises(ValueError, match=r"expected 0 <= memory <= 0\.\d") as info:
        select(model, {"params": 0.01, "memory": 0.5}, **THIN)
    most = float(re.search(r"memory <= ([\d.]+),", str(info.value)).group(1))
    plan = select(model, {"params": 0.01, "memory": most}, **THIN)
    assert plan.reduction("memory") >= most > 0.2
    # The default forms are not enough for narrow layers: others are taken, and keep the limit.
    with pytest.warns(UserWarning, match="parameters within the limit of memory from"):
        plan = select(model, LIMITS, method="energy")
    assert plan.reduction("memory") >= 0
    with pytest.raises(ValueError, match=r"cr=0\.95 is not reachable .*memory=0"):
        select(model, {"params": 0.95, "memory": 0.0}, **THIN)


@pytest.mark.parametrize("fraction", [-0.1, 1, True, None, "0"])
def test_fractions_of_memory(fraction: Any):
    with pytest.raises(ValueError, match="to be a number with 0 <= memory < 1"):
        select(zoo.functional(keras), {"params": 0.5, "memory": fraction})


def test_memory_alone_removes_nothing():
    model = zoo.functional(keras)
    with pytest.raises(ValueError, match="'params' or 'macs' beside 'memory'"):
        select(model, {"memory": 0.1})
    with pytest.raises(ValueError, match="Expected `objective` to be one of"):
        select(model, 0.1, objective="memory")
