"""`python -m fastbert` is the `fastbert` command."""

from fastbert.cli.app import main

if __name__ == "__main__":
    main()
