"""`python -m fastbert` is the `fastbert` command."""

from fastbert.cli import main

if __name__ == "__main__":
    main()
