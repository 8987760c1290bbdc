"""``python -m tests.torture.sim``: see `campaign`."""

import sys

from tests.torture.sim.campaign import main

if __name__ == "__main__":
    sys.exit(main())
