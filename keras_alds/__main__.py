"""`python -m keras_alds`: the command line, see `keras_alds.cli`."""

import sys

from keras_alds.cli import main

if __name__ == "__main__":
    sys.exit(main())
