"""`python -m pilot`, and the entry of the zipapp."""

import sys

from pilot.main import main

if __name__ == "__main__":
    sys.exit(main())
