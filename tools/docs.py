"""Builds the documentation into build/docs; a warning is an error. Arguments go to sphinx-build.

Needs what `python3 tools/bootstrap.py --docs` installs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "docs"


def main() -> int:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", "-c", "docs", *sys.argv[1:], "."]
    status = subprocess.run([*command, str(BUILD)], cwd=ROOT).returncode
    if status == 0:
        print(BUILD / "index.html")
    return status


if __name__ == "__main__":
    sys.exit(main())
