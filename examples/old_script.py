"""An old tf_keras training script, changed by two lines.

    pip install "keras_alds[demo,tf_keras]"
    python examples/old_script.py

The two lines:

    @@
     import tf_keras as keras
    +import keras_alds
    @@
         callbacks=[
             keras.callbacks.ReduceLROnPlateau(patience=2),
    +        keras_alds.ALDSCompress(cr=0.7, at_epoch=8),
         ],

All else is as it was: the model, `fit`, the optimizer, saving in HDF5. If your script says
`from tensorflow import keras`, set the environment variable `TF_USE_LEGACY_KERAS=1` as before.

On two CPU cores, in 10 seconds: 151,306 → 38,666 parameters, accuracy on 450 held-out images 97.6 %
before the compression (epoch 8) and 97.6 % at the end.
"""

from __future__ import annotations

import argparse

import tf_keras as keras
from common import digits

import keras_alds

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--limit", type=int, help="use only so many training and test images")
parser.add_argument("--file", default="digits.h5")
arguments = parser.parse_args()

keras.utils.set_random_seed(0)
x_train, y_train, x_test, y_test = digits(limit=arguments.limit)

model = keras.Sequential(
    [
        keras.layers.Conv2D(32, 3, activation="relu", padding="same", input_shape=(8, 8, 1)),
        keras.layers.Conv2D(64, 3, activation="relu", padding="same"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
parameters = model.count_params()
history = model.fit(
    x_train,
    y_train,
    epochs=12,
    validation_data=(x_test, y_test),
    verbose=0,
    callbacks=[
        keras.callbacks.ReduceLROnPlateau(patience=2),
        keras_alds.ALDSCompress(cr=0.7, at_epoch=8),
    ],
).history
model.save(arguments.file)

print("accuracy by epoch:", *(f"{value:.3f}" for value in history["val_accuracy"]))
loaded = keras.models.load_model(arguments.file)
print(f"parameters: {parameters:,}, in {arguments.file}: {loaded.count_params():,}")
print(f"accuracy of the loaded model: {loaded.evaluate(x_test, y_test, verbose=0)[1]:.3f}")
