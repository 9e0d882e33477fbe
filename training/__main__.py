"""`python -m dts.training`: see `dts.training.cli`."""

from dts.spin import limit_spinning
from dts.training.cli import main

if __name__ == "__main__":
    limit_spinning()
    raise SystemExit(main())
