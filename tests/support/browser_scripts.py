"""The page's scripts in Node.js: a function of one of them is called with JSON values, arrays of numbers as base64."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_dropkey.hub.static_folder import PAGE


CALL = """
import { readFileSync } from "node:fs";
const { file, name, cases } = JSON.parse(readFileSync(0, "utf8"));
const module = await import(file);
const read = (key, value) => (value?.bytes === undefined ? value : new Uint8Array(Buffer.from(value.bytes, "base64")));
const write = (key, value) =>
  ArrayBuffer.isView(value) ? { bytes: Buffer.from(value.buffer, value.byteOffset, value.byteLength).toString("base64") } : value;
const results = [];
for (const one of JSON.parse(JSON.stringify(cases), read)) {
  try {
    results.push({ value: await module[name](...one) });
  } catch (error) {
    results.push({ error: `${error.constructor.name}: ${error.message}` });
  }
}
process.stdout.write(JSON.stringify(results, write));
"""


def node() -> str:
    """The program of Node.js; skips the test where it is not installed."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("needs Node.js (Debian: apt-get install nodejs), which is not installed")
    return found


def scripts(folder: Path) -> Path:
    """A copy of the page's scripts, which Node.js takes for modules."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in PAGE.glob("*.js"):
        shutil.copyfile(file, folder / file.name)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


def call(folder: Path, file: str, name: str, cases: list[list[Any]]) -> list[Any]:
    """What a function returns for each list of arguments; a raised error as "Name: message"."""
    given = json.dumps({"file": str(folder / file), "name": name, "cases": cases}, default=_written)
    (folder / "call.js").write_text(CALL)
    done = subprocess.run([node(), str(folder / "call.js")], input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [found.get("value", found.get("error")) for found in json.loads(done.stdout)]


def _written(value: Any) -> Any:
    content = value if isinstance(value, bytes) else value.tobytes()
    return {"bytes": base64.b64encode(content).decode()}


def array(value: dict[str, str], dtype: Any) -> NDArray[Any]:
    """An array that came back."""
    return np.frombuffer(base64.b64decode(value["bytes"]), dtype)
