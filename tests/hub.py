"""Small KerasHub models with random weights, and a script that runs saved ones.

`python hub.py FOLDER` loads every `NAME.keras` there, and writes its outputs to `NAME.out.npy`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np

import keras_alds  # noqa: F401

hub = keras_hub.models
IMAGE = (32, 32, 3)


def _resnet(image_shape: tuple[int, ...], stages: int) -> Any:
    return hub.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64] * stages,
        stackwise_num_blocks=[1] * stages,
        stackwise_num_strides=[1] + [2] * (stages - 1),
        block_type="basic_block",
        image_shape=image_shape,
    )


def bert() -> Any:
    sizes = {"hidden_dim": 32, "intermediate_dim": 64, "max_sequence_length": 16}
    backbone = hub.BertBackbone(200, num_layers=2, num_heads=2, dropout=0.0, **sizes)
    return hub.BertTextClassifier(backbone, num_classes=3)


def vit() -> Any:
    sizes = {"num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    backbone = hub.ViTBackbone(image_shape=IMAGE, patch_size=8, num_layers=2, **sizes)
    return hub.ViTImageClassifier(backbone, num_classes=3)


def resnet() -> Any:
    return hub.ResNetImageClassifier(_resnet(IMAGE, 2), num_classes=3)


def efficientnet() -> Any:
    backbone = hub.EfficientNetBackbone(
        stackwise_width_coefficients=[0.5] * 3,
        stackwise_depth_coefficients=[1.0] * 3,
        stackwise_kernel_sizes=[3] * 3,
        stackwise_num_repeats=[1, 2, 2],
        stackwise_input_filters=[32, 16, 24],
        stackwise_output_filters=[16, 24, 40],
        stackwise_expansion_ratios=[1, 4, 4],
        stackwise_strides=[1, 2, 2],
        stackwise_squeeze_and_excite_ratios=[0.25] * 3,
        stackwise_block_types=["v1"] * 3,
        stackwise_force_input_filters=[0] * 3,
        stackwise_nores_option=[False] * 3,
        input_shape=IMAGE,
    )
    return hub.EfficientNetImageClassifier(backbone, num_classes=3)


def segmenter() -> Any:
    backbone = hub.DeepLabV3Backbone(
        image_encoder=_resnet((64, 64, 3), 4),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        dilation_rates=[2, 4],
        upsampling_size=4,
        image_shape=(64, 64, 3),
    )
    return hub.DeepLabV3ImageSegmenter(backbone, num_classes=3)


MODELS: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (bert, vit, resnet, efficientnet, segmenter)
}


def examples(model: Any) -> Any:
    """Seeded inputs for a model, by name if there are several."""
    random = np.random.default_rng(0)
    if len(model.inputs) > 1:
        zeros = np.zeros((8, 16), "int32")
        tokens = random.integers(0, 200, (8, 16)).astype("int32")
        return {"token_ids": tokens, "segment_ids": zeros, "padding_mask": zeros + 1}
    return random.random((8, *model.inputs[0].shape[1:])).astype("float32")


def main(folder: Path) -> None:
    """Runs every model in the folder."""
    for path in sorted(folder.glob("*.keras")):
        model = keras.models.load_model(path)
        outputs = np.asarray(model(examples(model), training=False))
        np.save(path.with_suffix(".out.npy"), outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
