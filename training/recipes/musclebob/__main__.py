"""`python -m dts.training.recipes.musclebob train` and `test`."""

import sys

from dts.spin import limit_spinning
from dts.training.recipes.musclebob.cli import main

if __name__ == "__main__":
    limit_spinning()
    sys.exit(main())
