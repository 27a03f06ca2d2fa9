"""`python -m hf_dropkey` is `hf-dropkey`."""

import sys

from hf_dropkey_cli import main


if __name__ == "__main__":
    sys.exit(main())
