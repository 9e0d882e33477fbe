"""`python -m dts.training.recipes.musclebob train` and `test`."""

import sys

from dts.training.recipes.musclebob.cli import main

if __name__ == "__main__":
    sys.exit(main())
