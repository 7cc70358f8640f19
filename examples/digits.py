"""The main job in a minute: train a small CNN, compress it inside `fit`, retrain, compare.

This is the command `keras_alds demo`, whose code is `keras_alds/cli/demo.py`. The line that
compresses is there in `train`: `ALDSCompress(cr=0.75, at_epoch=18)` among the callbacks of `fit`.

    python examples/digits.py
    python examples/digits.py --cr 0.8 --epochs 60 --at-epoch 40 --keras tf_keras

The example replaces what an earlier run wrote to `runs/digits/`.
"""

from __future__ import annotations

import sys

from keras_alds.cli import main

if __name__ == "__main__":
    main(["demo", "--force", *sys.argv[1:]])
