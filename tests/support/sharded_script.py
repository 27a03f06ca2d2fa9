"""Runs a script of the repository, `sharded_script.py SCRIPT ARGUMENTS`, on processes that may shard on a CPU."""

import os
import runpy
import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from forked import shard_on_cpu

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
