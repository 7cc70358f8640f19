"""The kinds of layers, one file each.

A file holds the factorized layers of a kind and all that is specific to the kind: its kernel,
its inputs, its MACs, its stock layers for `expand`. It registers itself. To add a kind, add its
file, a line here, and its public name in `layers.py`; to remove one, remove all three.
"""

from keras_alds.kinds import attention as attention
from keras_alds.kinds import chains as chains
from keras_alds.kinds import convolution as convolution
from keras_alds.kinds import dense as dense
from keras_alds.kinds import depthwise as depthwise
from keras_alds.kinds import einsum as einsum
from keras_alds.kinds import embedding as embedding
from keras_alds.kinds import holders as holders
from keras_alds.kinds import recurrent as recurrent
from keras_alds.kinds import separable as separable
from keras_alds.kinds import transposed as transposed
