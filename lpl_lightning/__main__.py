"""``python -m lpl_lightning`` is the ``lpl`` command."""

from lpl_lightning.cli import main

if __name__ == "__main__":
    main()
