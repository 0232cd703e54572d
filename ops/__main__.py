"""`python -m ops`: the command line."""

from ops.cli import main

if __name__ == "__main__":
    main()
