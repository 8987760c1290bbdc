"""``python -m prunus`` is ``prunus``."""

from prunus.runtime.cli import main

main()
