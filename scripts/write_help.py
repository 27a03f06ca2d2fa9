"""Writes `hf_dropkey_cli/arguments.json`, from which `hf-dropkey train --help` and others come in an instant.

    python scripts/write_help.py

Run it after any change of an argument group; a test fails until then.
"""

import json

from hf_dropkey.cli import help_texts
from hf_dropkey_cli.short_help import FILE


if __name__ == "__main__":
    FILE.write_text(json.dumps(help_texts(), indent=1) + "\n", encoding="utf-8")
    print(f"written: {FILE.name}")
