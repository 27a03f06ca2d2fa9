"""A new Python process that has the package, or has not.

Imports the standard library only.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
NO_PACKAGE = "import importlib.util\nassert importlib.util.find_spec('hf_dropkey') is None, 'the package is visible'\n"


def fresh(
    code: str, *arguments: Path, cache: Path, preamble: str = "", package: bool = False, **environment: str
) -> str:
    """Runs `code` in a new Python process and returns what it prints; the package is visible only if requested."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", **environment}
    if package:
        own["PYTHONPATH"] = str(REPOSITORY)
        script = preamble + textwrap.dedent(code)
    else:
        # an editable install finds the package through a hook or a path entry of its own
        script = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        script += f"sys.path[:] = [p for p in sys.path if p != {str(REPOSITORY)!r}]\n"
        script += NO_PACKAGE + preamble + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=own,
        cwd=arguments[0].parent if arguments else None,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
