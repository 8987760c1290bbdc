"""``python -m prunus.runtime.cli``."""

from prunus.runtime.cli import main

if __name__ == "__main__":
    main()
