"""Every kind of layer that the package knows, one file a kind.

A file holds the factorized layers of a kind and everything that is special about it. It registers
itself: a new kind is a file and a line here, and a kind goes with its file and its line.
"""

from keras_alds.kinds import attention as attention
from keras_alds.kinds import convolution as convolution
from keras_alds.kinds import dense as dense
from keras_alds.kinds import depthwise as depthwise
from keras_alds.kinds import einsum as einsum
from keras_alds.kinds import embedding as embedding
from keras_alds.kinds import recurrent as recurrent
from keras_alds.kinds import separable as separable
from keras_alds.kinds import transposed as transposed
