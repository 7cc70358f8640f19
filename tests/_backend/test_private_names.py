"""The private names of Keras 3, tf_keras, TensorFlow and TF-MOT that `_backend` relies on.

There is one test for each, with its name. A failing test says what a new version has changed, and
its docstring says what breaks.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend import clocks, training
from keras_alds._backend import layers as backend_layers
from keras_alds._backend.graphs import forget_graph, mask_of, set_mask
from keras_alds._backend.live import Holders
from keras_alds._backend.loops import all_steps_of, same_noise
from keras_alds._backend.strategies import Replicas

tf_keras = pytest.importorskip("tf_keras")

KERAS, TF_KERAS = _backend.backend_of(keras.layers.Layer()), _backend.tf_keras_backend()


def backend_of(K):
    return KERAS if K is keras else TF_KERAS


def chain(K, **options):
    """A model of two dense layers."""
    inputs = K.Input((6,), name="image")
    hidden = K.layers.Dense(4, name="hidden", **options)(inputs)
    return K.Model(inputs, K.layers.Dense(3, name="head")(hidden))


def sequential(K):
    return K.Sequential([K.Input((6,)), K.layers.Dense(4), K.layers.Dense(3)])


def transplanted(K, model=None, **options):
    """A model whose first dense layer has become another one, and that layer."""
    model = chain(K) if model is None else model
    new = K.layers.Dense(4, **options)
    new.build((None, None, 6))
    layer = model.layers[-2]
    backend_of(K).transplant(layer, new)
    return model, layer


class Nested:
    """A subclassed model that holds a layer inside a layer."""

    def __new__(cls, K):
        class Block(K.layers.Layer):
            def __init__(self, **options):
                super().__init__(**options)
                self.dense = K.layers.Dense(4, name="inner")

            def build(self, shape):
                self.dense.build(shape)
                self.built = True

            def call(self, x):
                return self.dense(x)

        class Outer(K.Model):
            def __init__(self):
                super().__init__(name="outer")
                self.block = Block(name="block")

            def call(self, x):
                return self.block(x)

        model = Outer()
        model(np.zeros((2, 6), "float32"))
        return model


# -- clocks.py ---------------------------------------------------------------------------------


def test_iterations():
    """What schedules go by. With gradient accumulation, Keras 3's `iterations` is another count."""
    for K, options in ((keras, {"gradient_accumulation_steps": 2}), (tf_keras, {})):
        optimizer = K.optimizers.Adam(
            K.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5), **options
        )
        optimizer._iterations.assign(3)
        assert clocks.clock(optimizer) == 3
        assert backend_of(K).learning_rate(optimizer) == 0.125


# -- layers.py ---------------------------------------------------------------------------------


def test_flatten_layers(keras_module):
    """Lists the layers inside a layer. Without it none inside a user's own layer are found."""
    model, backend = Nested(keras_module), backend_of(keras_module)
    (block,) = backend.children(model)
    assert block is model.block
    assert backend.children(block) == [block.dense]


def test_inbound_nodes():
    """Keras 3 keeps a layer's calls there. Without it a factorized layer leaves the graph."""
    model, layer = transplanted(keras)
    assert layer.output is model.layers[-1].input
    tensor = layer.output
    assert KERAS.producer(tensor)[0].layer is layer


def test_inbound_nodes_value():
    """As `_inbound_nodes`, in tf_keras, where that is a property."""
    model, layer = transplanted(tf_keras)
    assert layer.output is model.layers[-1].input
    assert len(layer.inbound_nodes) == 1


def test_outbound_nodes_value():
    """The calls on a layer's outputs in tf_keras; TF-MOT reads them to find what comes next."""
    model, layer = transplanted(tf_keras)
    assert [node.outbound_layer for node in layer.outbound_nodes] == [model.layers[-1]]


def test_name():
    """A layer's name in tf_keras. Without it a layer is renamed when it is factorized."""
    _, layer = transplanted(tf_keras, name="another")
    assert layer.name == "hidden"


def test_path():
    """Where a layer is in a Keras 3 model, as `layer.path`. Without it a factorized layer moves."""
    model = Nested(keras)
    layer = model.block.dense
    if not hasattr(layer, "path"):
        pytest.skip("this Keras has none yet")
    path = layer.path
    assert path == "outer/block/inner"
    new = keras.layers.Dense(4, name="inner")
    new.build((None, 6))
    KERAS.transplant(layer, new)
    assert layer.path == path


def test_build_shapes_dict():
    """What a Keras 3 layer was built on. Without it saved models build layers on less."""
    model = chain(keras)
    config = model.layers[-2].get_build_config()
    _, layer = transplanted(keras, model)
    assert layer.get_build_config() == config == {"input_shape": (None, 6)}


def test_build_input_shape():
    """As `_build_shapes_dict`, in tf_keras."""
    model = chain(tf_keras)
    config = model.layers[-2].get_build_config()
    _, layer = transplanted(tf_keras, model)
    assert layer.get_build_config() == config == {"input_shape": (None, 6)}


@pytest.mark.parametrize("kind", ["layer", "optimizer"])
def test_tracker(kind):
    """Holds the lists of a Keras 3 object's variables, locked once it is built.

    Without it a factorized layer cannot keep its bias, nor an optimizer forget the dense kernel.
    """
    if kind == "layer":
        model = chain(keras)
        bias = model.layers[-2].bias
        new = keras.layers.Dense(4)
        new.build((None, 6))
        KERAS.transplant(model.layers[-2], new, {"bias": "bias"})
        assert model.layers[-2].bias is bias
        assert [v is bias for v in model.layers[-2].weights] == [False, True]
    else:
        model, optimizer = rebuilt(keras)
        assert sum(v is w for v in optimizer.variables for w in optimizer._momentums) == 3


def test_jit_compiled_convolution_op():
    """What tf_keras runs a grouped convolution with; on CPUs its gradient is very slow."""
    layer = tf_keras.layers.Conv2D(4, 3, groups=2)
    layer.build((None, 8, 8, 4))
    TF_KERAS.use_plain_convolutions([layer])
    calls, plain = [], layer.convolution_op
    assert layer._jit_compiled_convolution_op == plain
    layer._jit_compiled_convolution_op = lambda *args: calls.append(args) or plain(*args)
    layer(np.ones((1, 8, 8, 4), "float32"))
    assert calls


def test_backward_layer_config():
    """What tf_keras saves of a Bidirectional's second layer: without it the stock one."""
    layers = tf_keras.layers
    layer = layers.Bidirectional(layers.GRU(3), backward_layer=layers.GRU(3, go_backwards=True))
    layer.build((None, 5, 4))
    layer.backward_layer.cell.dropout = 0.25
    undo = TF_KERAS.renew_bidirectional(layer)
    assert layer.get_config()["backward_layer"]["config"]["dropout"] == 0.25
    undo()
    assert layer.get_config()["backward_layer"]["config"]["dropout"] == 0


def test_callable_losses():
    """The regularizers of a tf_keras layer's weights. Without it they stay those of the kernel."""
    _, layer = transplanted(tf_keras, chain(tf_keras, kernel_regularizer="l2"))
    assert layer.losses == []
    _, layer = transplanted(tf_keras, kernel_regularizer=lambda w: tf.reduce_sum(w) * 0 + 7)
    assert [float(loss) for loss in layer.losses] == [7]


def test_loss_for_variable():
    """Names the function in such a loss whose argument is the weight."""
    bias = {"bias_regularizer": lambda w: tf.reduce_sum(w) * 0 + 3}
    model = chain(tf_keras, kernel_regularizer=lambda w: tf.reduce_sum(w) * 0 + 5, **bias)
    layer = model.layers[-2]
    layer.add_loss(lambda: tf.constant(11.0))
    new = tf_keras.layers.Dense(4)
    new.build((None, 6))
    TF_KERAS.transplant(layer, new, {"bias": "bias"})
    # That of the kernel is gone; those of the bias, which is kept, and of the user are not.
    assert sorted(float(loss) for loss in layer.losses) == [3, 11]


def test_dense(keras_module):
    """The projections of an attention layer, `_query_dense` and so on: what is factorized."""
    layer = keras_module.layers.MultiHeadAttention(2, 4)
    x = np.ones((1, 3, 8), "float32")
    layer(x, x)
    found = backend_layers.projections(layer, ("query", "key", "value", "output", "gate"))
    assert found.pop("gate") is None
    assert {type(dense) for dense in found.values()} == {keras_module.layers.EinsumDense}
    assert set(map(id, found.values())) < set(map(id, backend_of(keras_module).children(layer)))


def test_maybe_update_block_mask():
    """The mask that TF-MOT's pruning would give a weight. Without it factors are not pruned."""
    tfmot = pytest.importorskip("tensorflow_model_optimization")
    sparsity = tfmot.sparsity.keras
    layer = sparsity.prune_low_magnitude(
        tf_keras.layers.Dense(4, input_shape=(6,)), sparsity.ConstantSparsity(0.5, 0)
    )
    tf_keras.Sequential([layer])
    layer.pruning_step.assign(0)
    threshold, mask = backend_layers.pruning_mask(layer, layer.layer.kernel)
    mask, kernel = np.asarray(mask), np.abs(np.asarray(layer.layer.kernel))
    assert mask.sum() == 12
    np.testing.assert_array_equal(mask == 1, kernel >= np.asarray(threshold))


# -- live.py -------------------------------------------------------------------------------------


def test_value():
    """`value` is a cast copy where a layer runs in mixed precision, and a copy has no handle."""
    variable = keras.Variable(1.0)
    assert isinstance(variable._value, tf.Variable)
    assert variable._value is variable.value


def test_captured_inputs():
    """What a graph reads. `captured_inputs` also calls what makes keys of collective operations."""
    variable, calls = tf.Variable(1.0), []

    @tf.function
    def function():
        def key():
            calls.append(len(calls))
            return tf.constant(7)

        graph = tf.compat.v1.get_default_graph()
        return variable * tf.cast(
            graph.capture_call_time_value(key, tf.TensorSpec([], tf.int32)), tf.float32
        )

    function()
    before = len(calls)
    assert before
    undo = []
    Holders({}, [], [function]).forget_graphs([variable], undo)
    assert len(undo) == 1
    assert len(calls) == before


# -- strategies.py -------------------------------------------------------------------------------


class KeyedStrategy:
    """A model under a strategy of two replicas, as far as `Replicas` looks at it."""

    num_replicas_in_sync = 2

    def __init__(self):
        self.extended = tf.distribute.MirroredStrategy(["CPU:0"]).extended
        self.distribute_strategy = self


def test_collective_keys():
    """Where a strategy counts its operations. Without it a second strategy in a process fails."""
    model = KeyedStrategy()
    keys = model.extended._collective_keys
    group = keys.get_group_key(["/device:CPU:0"])
    before = keys.get_instance_key(group, "/device:CPU:0")
    Replicas(model).renew_keys()
    first = keys.get_instance_key(group, "/device:CPU:0")
    Replicas(model).renew_keys()
    second = keys.get_instance_key(group, "/device:CPU:0")
    assert first - before >= 2**19
    assert second - first >= 2**19


def test_instance_key_table():
    """The next keys of each device, as in `_collective_keys`."""
    table = KeyedStrategy().extended._collective_keys._instance_key_table
    assert all(isinstance(key, int) for group in table.values() for key in group.values())
    assert table


# -- graphs.py -----------------------------------------------------------------------------------


def test_clear_losses(keras_module):
    """Forgets losses of a traced call. Without it `model.losses` holds tensors of a dead graph."""
    model = chain(keras_module, activity_regularizer="l2")
    before = model.losses
    backend_of(keras_module).trace_shapes(model, [model.layers[-1]])
    assert set(map(id, model.losses)) <= set(map(id, before))


def test_stateful(keras_module):
    """tf_keras's flag of a stateful layer. Without it a pass that looks at its steps changes it."""
    layer = keras_module.layers.GRU(3, stateful=True)
    x = np.ones((2, 5, 4), "float32")
    layer(x)
    before = [np.asarray(state) for state in layer.states]
    all_steps_of(layer)(tf.constant(x), initial_state=[tf.zeros((2, 3))])
    assert all(map(np.array_equal, layer.states, before))


def test_seed_generators():
    """Without it, passes over the same examples draw different random numbers in Keras 3."""
    layer = keras.layers.Dropout(0.5)
    (seed,) = KERAS.seeds(layer)
    before = seed.numpy()
    layer(np.ones((2, 3)), training=True)
    assert not np.array_equal(seed.numpy(), before)


@pytest.fixture
def dropped():
    """What a Dropout of tf_keras gives in a context of the same noise, each time it is called."""
    layer = tf_keras.layers.Dropout(0.5)

    def call():
        with same_noise(layer):
            return layer(np.ones((8, 16), "float32"), training=True).numpy()

    return call


def test_random_generator(dropped):
    """Without it, passes over the same examples draw different random numbers in tf_keras."""
    assert np.array_equal(dropped(), dropped())


def test_rng_type():
    """As `_random_generator`: how it draws numbers."""
    generator = tf_keras.layers.Dropout(0.5)._random_generator
    assert generator._rng_type in (generator.RNG_LEGACY_STATEFUL, generator.RNG_STATEFUL)


def test_generator(dropped):
    """As `_random_generator`: what draws numbers, and has a state."""
    layer = tf_keras.layers.Dropout(0.5)
    before = dict(vars(layer._random_generator))
    with same_noise(layer):
        assert layer._random_generator._generator.state.shape == (3,)
    assert vars(layer._random_generator) == before


def test_nodes_by_depth(keras_module):
    """The calls in a model's graph. Without it no graph can be read."""
    model = chain(keras_module)
    calls = backend_of(keras_module).graph(model)
    assert [call.layer for call in calls] == model.layers


def test_functional():
    """The graph inside a Keras 3 Sequential model."""
    model = sequential(keras)
    calls = KERAS.graph(model)
    assert [call.layer for call in calls][-2:] == model.layers
    start, end = KERAS.graph_ends(model)
    assert (start, end) == (model.inputs[0], model.outputs[0])


def test_keras_history(keras_module):
    """Which call gave a symbolic tensor."""
    K = keras_module
    lstm = K.layers.LSTM(3, return_state=True)
    inputs = K.Input((5, 6))
    model = K.Model(inputs, lstm(inputs))
    call, index = backend_of(K).producer(model.outputs[2])
    assert call.layer is lstm
    assert index == 2
    assert call.args[0] is inputs


def test_keras_mask(keras_module):
    """The mask that goes with a tensor. Without it padding counts as data."""
    K = keras_module
    tensor = K.layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(np.asarray(mask_of(tensor)), [[True, False]])
    plain = tf.constant([[[1.0], [9.0]]])
    assert mask_of(plain) is None
    set_mask(plain, tf.constant([[True, False]]))
    mean = K.layers.GlobalAveragePooling1D()(plain)
    np.testing.assert_array_equal(np.asarray(mean), [[1]])


def test_clone():
    """Makes a `tf.function` without its graphs. Without it one goes on running the dense model."""
    traced = []

    @tf.function
    def function(x):
        traced.append(x)
        return x

    function(tf.zeros(2))
    undo = forget_graph(function)
    for _ in range(2):
        function(tf.zeros(2))
    assert len(traced) == 2
    undo()
    function(tf.zeros(2))
    assert len(traced) == 2


def test_function_cache(keras_module):
    """The graphs of a `tf.function`. Without it other models go on running dense layers."""
    model = chain(keras_module)
    run, other = tf.function(model), tf.function(lambda x: x + 1)
    graphs = [f.get_concrete_function(tf.ones((2, 6))) for f in (run, other)]
    undo = []
    holders = Holders.of(backend_of(keras_module), model)
    holders.forget_graphs([model.layers[1].kernel], undo)
    traced = [f.experimental_get_tracing_count() for f in (run, other)]
    assert traced == [0, 1]
    with pytest.raises(RuntimeError, match="a concrete function of the model as it is now"):
        graphs[0](tf.ones((2, 6)))
    graphs[1](tf.ones((2, 6)))
    for step in reversed(undo):
        step()
    graphs[0](tf.ones((2, 6)))
    assert run.experimental_get_tracing_count() == 1


# -- training.py: what slots hold ------------------------------------------------------------------


def slots(K, make):
    """What the slots of an optimizer hold, by their names."""
    model = chain(K)
    optimizer = make(K)
    optimizer.build(model.trainable_variables)
    return {
        name: training.slot_meaning(optimizer, name)
        for name in backend_of(K).slots(optimizer, model.trainable_variables)
    }


def test_momentums(keras_module):
    """Adam's first moments. Without it they start at zero when a kernel is factorized."""
    assert slots(keras_module, lambda K: K.optimizers.Adam())["_momentums"] == training.LINEAR


def test_velocities(keras_module):
    """The second moments of Adam, Nadam and RMSprop. Without it they start at zero."""
    for name in ("Adam", "Nadam", "RMSprop"):
        found = slots(keras_module, lambda K, name=name: getattr(K.optimizers, name)())
        assert found["_velocities"] == training.SQUARED


def test_velocity_hats(keras_module):
    """The greatest second moments of AMSGrad. Without it they start at zero."""
    found = slots(keras_module, lambda K: K.optimizers.Adam(amsgrad=True))
    assert found["_velocity_hats"] == training.SQUARED


def test_m(keras_module):
    """Adamax's first moments. Without it they start at zero."""
    assert slots(keras_module, lambda K: K.optimizers.Adamax())["_m"] == training.LINEAR


def test_accumulators(keras_module):
    """Adagrad's sums of squares. Without it they start at their initial value."""
    assert slots(keras_module, lambda K: K.optimizers.Adagrad())["_accumulators"] == (
        training.SQUARED
    )


def test_accumulated_grads(keras_module):
    """Adadelta's averages of squares. Without it they start at zero."""
    found = slots(keras_module, lambda K: K.optimizers.Adadelta())
    assert found["_accumulated_grads"] == training.SQUARED


def test_accumulated_gradients():
    """Gradients that Keras 3 adds up for a later step. Without it those of a kernel are lost."""
    found = slots(keras, lambda K: K.optimizers.SGD(gradient_accumulation_steps=2))
    assert found["_accumulated_gradients"] == training.LINEAR


def test_model_variables_moving_average(keras_module):
    """Averages of weights. Without it those of the factors start at zero."""
    found = slots(keras_module, lambda K: K.optimizers.SGD(use_ema=True))
    assert found["_model_variables_moving_average"] == training.AVERAGE


# -- training.py: optimizers -----------------------------------------------------------------------


def rebuilt(K, make=None, undo=False):
    """A model and its optimizer, built on all weights and then on all but the first."""
    model = chain(K)
    optimizer = (make or K.optimizers.Adam)()
    old = model.trainable_variables
    backend, steps = backend_of(K), []
    optimizer.apply_gradients([(tf.ones(v.shape), v) for v in old])
    backend.rebuild_optimizer(optimizer, old, old[1:], steps)
    if undo:
        for step in reversed(steps):
            step()
    return model, optimizer


def same(found, expected):
    return [id(v) for v in found] == [id(v) for v in expected]


def test_exclude_from_weight_decay(keras_module):
    """The variables that are not decayed. Without it the factors of such a kernel are."""
    K = keras_module
    model, optimizer = chain(K), K.optimizers.AdamW()
    first, second, *_ = model.trainable_variables
    optimizer.exclude_from_weight_decay(var_list=[first])
    backend = backend_of(K)
    assert backend.is_excluded_from_weight_decay(optimizer, first)
    assert not backend.is_excluded_from_weight_decay(optimizer, second)
    optimizer.build(model.trainable_variables)
    undo = backend.exclude_from_weight_decay(optimizer, [second])
    assert backend.is_excluded_from_weight_decay(optimizer, second)
    undo()
    assert not backend.is_excluded_from_weight_decay(optimizer, second)


def test_var_key(keras_module):
    """The key by which an optimizer knows a variable, in `_exclude_from_weight_decay`."""
    optimizer, variables = keras_module.optimizers.AdamW(), chain(keras_module).trainable_variables
    backend = backend_of(keras_module)
    backend.exclude_from_weight_decay(optimizer, variables[1:2])
    found = [backend.is_excluded_from_weight_decay(optimizer, v) for v in variables]
    assert found == [False, True, False, False]


def test_trainable_variables():
    """What a Keras 3 optimizer was built on, in order. Without it no state can be carried over."""
    model, optimizer = rebuilt(keras)
    assert same(KERAS.optimizer_targets(optimizer, []), model.trainable_variables[1:])


def test_trainable_variables_indices():
    """The places of these variables. With old entries an optimizer updates with a wrong slot."""
    model, optimizer = rebuilt(keras)
    places = optimizer._trainable_variables_indices
    assert sorted(places.values()) == [0, 1, 2]
    assert set(places) == {optimizer._var_key(v) for v in model.trainable_variables[1:]}


def test_variables(keras_module):
    """All variables of an optimizer. Without it the slots of gone kernels are saved on."""
    _, optimizer = rebuilt(keras_module)
    shapes = [tuple(v.shape) for v in optimizer.variables if len(v.shape)]
    assert sorted(shapes) == sorted(2 * [(4,), (4, 3), (3,)])


def test_track_trackable(tmp_path):
    """Lets TensorFlow save the new list of a Keras 3 optimizer's variables, not the old one."""
    _, optimizer = rebuilt(keras)
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    shapes = [shape for name, shape in tf.train.list_variables(path) if "/_variables/" in name]
    assert sorted(shapes) == sorted(2 * [[4], [4, 3], [3]])


def test_internal():
    """`tf.__internal__.tracking.wrap` makes a list that TensorFlow saves; as it makes Keras's."""
    wrapped = tf.__internal__.tracking.wrap([tf.Variable(1.0)])
    assert type(wrapped) is type(rebuilt(keras)[1].__dict__["_variables"])
    optimizer = keras.optimizers.Adam()
    assert type(wrapped) is type(optimizer.__dict__["_variables"])


def test_self(keras_module, tmp_path):
    """The prefix of what TensorFlow tracks of an object. Without it an undo is not whole."""
    _, optimizer = rebuilt(keras_module, undo=True)
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    shapes = [shape for name, shape in tf.train.list_variables(path) if "/_variables/" in name]
    assert sorted(shape for shape in shapes if shape) == sorted(2 * [[6, 4], [4], [4, 3], [3]])


def test_built():
    """Whether a tf_keras optimizer is built. Without it none can be built on other variables."""
    optimizer = tf_keras.optimizers.Adam()
    assert not TF_KERAS.is_optimizer_built(optimizer)
    _, optimizer = rebuilt(tf_keras)
    assert TF_KERAS.is_optimizer_built(optimizer)
    assert len(optimizer._momentums) == 3


def test_index_dict():
    """The keys of a tf_keras optimizer's variables, in order."""
    model, optimizer = rebuilt(tf_keras)
    known = list(reversed(model.trainable_variables))
    assert same(TF_KERAS.optimizer_targets(optimizer, known), model.trainable_variables[1:])


def test_coalesced_children(tmp_path):
    """What a tf_keras optimizer saved first and saves on. Kept, it saves slots that are gone."""
    model, optimizer = chain(tf_keras), tf_keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "before"))
    assert "_coalesced_children" in vars(optimizer)
    old = model.trainable_variables
    TF_KERAS.rebuild_optimizer(optimizer, old, old[1:], [])
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "after"))
    shapes = [shape for name, shape in tf.train.list_variables(path) if "_variables" in name]
    assert [6, 4] not in shapes


def legacy():
    return tf_keras.optimizers.legacy.SGD(momentum=0.9)


def test_slots():
    """The slots of a legacy optimizer by variable; those of a kernel that is gone are dropped."""
    model, optimizer = rebuilt(tf_keras, legacy)
    first, *rest = model.trainable_variables
    assert same(TF_KERAS.optimizer_targets(optimizer, [first, *rest]), rest)
    model, optimizer = rebuilt(tf_keras, legacy, undo=True)
    found = TF_KERAS.optimizer_targets(optimizer, model.trainable_variables)
    assert same(found, model.trainable_variables)


def test_create_all_weights():
    """Makes the slots of a legacy optimizer before its next step."""
    _, optimizer = rebuilt(tf_keras, legacy)
    shapes = [tuple(v.shape) for v in optimizer.weights]
    assert shapes == [(), (4,), (4, 3), (3,)]


# -- training.py: callbacks ----------------------------------------------------------------------


@pytest.fixture
def counted():
    """tf_keras's list of a callback, and the names of the hooks that it was asked for."""
    asked = []

    class Asked(_backend.Callback):
        def __getattribute__(self, name):
            asked.append(name)
            return super().__getattribute__(name)

    tf_keras.callbacks.CallbackList([Asked()], model=chain(tf_keras))
    return asked


def test_implements_train_batch_hooks(counted):
    """tf_keras asks every callback. Without it `fit` of tf_keras raises an AttributeError."""
    assert "_implements_train_batch_hooks" in counted


def test_implements_test_batch_hooks(counted):
    """As above, for `evaluate`."""
    assert "_implements_test_batch_hooks" in counted


def test_implements_predict_batch_hooks(counted):
    """As above, for `predict`."""
    assert "_implements_predict_batch_hooks" in counted


# -- cloning.py ------------------------------------------------------------------------------------


def test_learning_rate(keras_module):
    """An optimizer's schedule. Without it one that cannot be serialized cannot be copied."""
    K = keras_module

    class Schedule(K.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.5

    schedule, model = Schedule(), chain(K)
    model.compile(K.optimizers.SGD(schedule), "mse")
    copy = backend_of(K).copy_model(model)
    assert copy.optimizer is not model.optimizer
    assert copy.optimizer._learning_rate is model.optimizer._learning_rate is schedule


def test_build_learning_rate():
    """What makes tf_keras's rate a variable. Without it a schedule cannot give way to a rate."""
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9)
    optimizer = tf_keras.optimizers.SGD(schedule)
    TF_KERAS.set_learning_rate(optimizer, 0.25)
    assert float(optimizer.learning_rate) == 0.25
    assert float(optimizer._build_learning_rate(0.125)) == 0.125


def test_compile_config(keras_module):
    """The arguments of `compile`, as objects. Without it a user's own loss cannot be copied."""

    def loss(y, y_pred):
        return tf.reduce_mean(y - y_pred)

    model = chain(keras_module)
    model.compile("sgd", loss, metrics=["mae"], loss_weights=[2.0])
    found = backend_of(keras_module).compile_arguments(model)
    assert found["loss"] is loss
    assert found["metrics"] == ["mae"]
    assert found["loss_weights"] == [2.0]
    assert found["optimizer"] is model.optimizer


def excluded_by_name(K):
    model = chain(K)
    model.compile(K.optimizers.AdamW(), "mse")
    model.optimizer.exclude_from_weight_decay(var_names=["bias"])
    return backend_of(K).copy_model(model).optimizer


def test_exclude_from_weight_decay_pattern():
    """The names that a Keras 3 optimizer does not decay. Without it a copy decays them."""
    assert excluded_by_name(keras)._exclude_from_weight_decay_pattern.search("head/bias")


def test_exclude_from_weight_decay_names():
    """The same in tf_keras."""
    assert excluded_by_name(tf_keras)._exclude_from_weight_decay_names == ["bias"]


def test_output_shape():
    """The shape that a Keras 3 Lambda was given. Without it a copy may not know its outputs."""
    inputs = keras.Input((6,))
    outputs = keras.layers.Lambda(lambda x: x[:, :2], lambda shape: (shape[0], 2))(inputs)
    copy = KERAS.copy_model(keras.Model(inputs, outputs))
    assert copy.layers[-1].compute_output_shape((None, 6)) == (None, 2)


# -- Inputs that are not dense, and optimizers of several optimizers -----------------------------


def kinds_of_inputs(name):
    """A flag of three input tensors, dense, sparse and ragged."""
    inputs = [keras.Input((3,)), keras.Input((3,), sparse=True), keras.Input((3,), ragged=True)]
    return [getattr(tensor, name) for tensor in inputs]


def test_sparse():
    """Whether a symbolic tensor is sparse. Without it, copied models make their inputs dense."""
    assert kinds_of_inputs("_sparse") == [False, True, False]


def test_ragged():
    """Whether a symbolic tensor is ragged; as `_sparse`."""
    assert kinds_of_inputs("_ragged") == [False, False, True]


def test_ragged_rank():
    """The number of ragged axes, or None; as `_sparse`."""
    assert kinds_of_inputs("_ragged_rank")[0] is None


@pytest.fixture
def multi_optimizer():
    """A built optimizer of two, which choose by path."""
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has none yet")
    paths = keras.optimizers.OptimizerMap(keras.optimizers.SGD(name="rest"))
    paths["head/.*"] = keras.optimizers.Adam(name="head")
    optimizer = keras.optimizers.MultiOptimizer(paths)
    optimizer.build(chain(keras).trainable_variables)
    return optimizer


def test_optimizer_map(multi_optimizer):
    """How it chooses, and the paths in an `OptimizerMap`; without it factors get the default."""
    paths = multi_optimizer._optimizer_map
    assert isinstance(paths, keras.optimizers.OptimizerMap)
    assert list(paths._optimizer_map) == ["head/.*"]


def test_inner_optimizers(multi_optimizer):
    """The list behind `optimizers`. Without it a copy lacks settings of weights."""
    assert multi_optimizer._inner_optimizers is multi_optimizer.optimizers
    assert [inner.name for inner in multi_optimizer.optimizers] == ["head", "rest"]


def test_var_to_optimizer_idx(multi_optimizer):
    """The optimizer of every variable; without it training fails after the compression."""
    places = multi_optimizer._var_to_optimizer_idx
    for place, inner in enumerate(multi_optimizer.optimizers):
        keys = {multi_optimizer._var_key(variable) for variable in inner._trainable_variables}
        assert keys == {key for key, found in places.items() if found == place}
        assert len(keys) == 2


def interrupted_backup(model, tmp_path, monkeypatch, at):
    """Backs up epoch 0, and ends in the backup of epoch 1."""
    backup = keras.callbacks.BackupAndRestore(str(tmp_path))
    backup.set_model(model)
    KERAS.make_backups_safe(backup)
    backup.on_epoch_end(0)
    for weight in model.weights:
        weight.assign(weight + 1)
    with monkeypatch.context() as patch:
        patch.setattr(at, _interrupt)
        with pytest.raises(KeyboardInterrupt):
            backup.on_epoch_end(1)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def restored(model, tmp_path):
    """The first epoch of a training that is resumed."""
    backup = keras.callbacks.BackupAndRestore(str(tmp_path))
    backup.set_model(model)
    KERAS.make_backups_safe(backup)
    backup.on_train_begin()
    return model._initial_epoch


@pytest.fixture
def trained():
    model = chain(keras)
    model.compile("sgd", "mse")
    return model


def test_weights_path(trained, tmp_path, monkeypatch):
    """Without it, a backup that is interrupted in its weights would be lost."""
    before = trained.get_weights()
    interrupted_backup(trained, tmp_path, monkeypatch, "keras.src.saving.saving_lib._save_state")
    assert restored(trained, tmp_path) == 1
    for a, b in zip(before, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_metadata_path(trained, tmp_path, monkeypatch):
    """Without it, the weights would be of another epoch than the number."""
    before = trained.get_weights()
    interrupted_backup(trained, tmp_path, monkeypatch, "json.dumps")
    assert restored(trained, tmp_path) == 1
    for a, b in zip(before, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_save_model(trained, tmp_path, monkeypatch):
    """Without it, an interruption between the two files would lose an epoch."""
    interrupted_backup(trained, tmp_path, monkeypatch, "os.replace")
    later = trained.get_weights()
    trained.set_weights([weight * 0 for weight in later])
    assert restored(trained, tmp_path) == 2
    for a, b in zip(later, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_current_epoch(trained, tmp_path):
    """Without it, a second interruption would start the training at epoch 0."""
    backup = keras.callbacks.BackupAndRestore(str(tmp_path), save_freq=1)
    backup.set_model(trained)
    KERAS.note_epoch(backup, 3)
    backup.on_train_batch_end(0)
    assert restored(trained, tmp_path) == 3
