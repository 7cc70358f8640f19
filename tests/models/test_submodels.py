"""Parts of a model by their attribute paths, and frozen ones."""

from __future__ import annotations

import pytest

from keras_alds import select
from keras_alds.models.inventory import Inventory
from keras_alds.models.submodels import find_submodel, frozen_part, twins


def net(K, name):
    return K.Sequential([K.Input((8,)), K.layers.Dense(8)], name=name)


def trainer(K):
    class Trainer(K.Model):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = net(K, "small"), net(K, "large")
            self.blocks = [net(K, "first"), net(K, "second")]
            self.by_name = {"head": net(K, "head")}
            self.student.inner = self.blocks[1]

    return Trainer()


class TestFind:
    def test_paths_and_objects(self, keras_module):
        model = trainer(keras_module)
        for given, found in {
            None: model,
            model: model,
            "student": model.student,
            "student.inner": model.blocks[1],
            "blocks.0": model.blocks[0],
            "by_name.head": model.by_name["head"],
            "large": model.teacher,  # the name of a layer, as Functional models have only these
            model.blocks[0]: model.blocks[0],
        }.items():
            assert find_submodel(model, given) is found

    @pytest.mark.parametrize("path", ["studnet", "blocks.2", "blocks.x", "by_name.x", "", "call"])
    def test_wrong_paths(self, keras_module, path):
        text = f"Received: submodel='{path}'. Its models: 'student', 'teacher'"
        with pytest.raises(ValueError, match=text):
            find_submodel(trainer(keras_module), path)

    def test_models_of_another_trainer(self, keras_module):
        other = trainer(keras_module)
        with pytest.raises(ValueError, match=r"not inside it\. Its models: 'student', 'teacher'"):
            find_submodel(trainer(keras_module), other.student)

    def test_single_layers(self, keras_module):
        with pytest.raises(ValueError, match=r"of type Dense\. To compress single layers, `excl"):
            find_submodel(trainer(keras_module), "student.layers.0")


class TestExclude:
    def paths(self, model, *exclude):
        """The paths of the layers that are excluded."""
        inventory = Inventory.of(model, exclude)
        assert not inventory.unmatched
        return {record.path.split("/")[0] for record in inventory.records if record.excluded}

    def test_attribute_paths(self, keras_module):
        model = trainer(keras_module)
        assert self.paths(model, "teacher") == {"large"}
        assert self.paths(model, "blocks.0", "by_name.head") == {"first", "head"}
        (record,) = (r for r in Inventory.of(model, ["teacher"]).records if r.excluded)
        assert record.skipped.detail == "excluded by exclude='teacher'"

    def test_names_and_patterns_come_first(self, keras_module):
        model = trainer(keras_module)
        model.large = model.student
        model.sec = model.teacher
        assert self.paths(model, "large") == {"large"}
        assert self.paths(model, "sec.*") == {"second"}

    def test_what_is_no_layer(self, keras_module):
        model = trainer(keras_module)
        for item in ("blocks", "call", "techer"):
            assert Inventory.of(model, [item]).unmatched == (item,)
        with pytest.warns(UserWarning, match="Did you mean 'teacher'"):
            Inventory.of(model, ["techer"]).warn_of_unmatched(stacklevel=1)

    def test_bounds(self, keras_module):
        model = trainer(keras_module)
        bounds = {"teacher": (None, 0.0), "student": (0.1, None), "nobody": (None, 0.5)}
        with pytest.warns(UserWarning, match="'nobody' matches no layer"):
            plan = select(model, 0.1, method="energy", bounds=bounds, target="size")
        removed = {choice.layer.split("/")[0] for choice in plan.factorized}
        assert "small" in removed
        assert "large" not in removed


class TestFrozen:
    def test_is_found_beside_what_is_trained(self, keras_module):
        model = trainer(keras_module)
        records = Inventory.of(model).candidates
        assert frozen_part(model, records) is None
        model.teacher.trainable = False
        assert "'large', a frozen part of" in frozen_part(model, records)
        assert frozen_part(model, records).endswith("that are trained, such as 'student'")
        for exclude in ("large", "teacher"):
            assert frozen_part(model, Inventory.of(model, [exclude]).candidates) is None
        model.trainable = False
        assert frozen_part(model, records) is None  # nothing is trained


@pytest.mark.parametrize("widths", [(64, 8), (64, 9)])
@pytest.mark.parametrize("shared", [False, True])
def test_twins_have_weights_of_the_same_shapes(keras_module, widths, shared):
    K = keras_module

    class Pair(K.Model):
        def __init__(self):
            super().__init__()
            self.online = net(8)
            self.target = self.online if shared else net(widths[1])

    def net(width):
        return K.Sequential([K.Input((32,)), K.layers.Dense(64), K.layers.Dense(width)])

    class Unbuilt(K.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = (K.Sequential([K.layers.Dense(8)]) for _ in range(2))

    assert twins(Unbuilt()) is None
    expected = ("online", "target") if widths[1] == 8 and not shared else None
    assert twins(Pair()) == expected
