"""The pilot as one file that any Python 3.11 runs."""

import shutil
import tempfile
import zipapp
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).parents[1] / "pilot"
# An older Python could not even read the modules: what it is told must be plain.
_MAIN: Final = """import sys
if sys.version_info < (3, 11):
    sys.exit("culm-pilot: needs Python 3.11 or newer, this is " + sys.version.split()[0])
from pilot.main import main
sys.exit(main())
"""


def build(target: Path) -> Path:
    """Write the zipapp to `target`, replaced as a whole; the path. Raises OSError. Safe to retry: yes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "app"
        shutil.copytree(SOURCE, root / "pilot", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "__main__.py").write_text(_MAIN, encoding="utf-8")
        beside = target.with_name(target.name + ".new")
        zipapp.create_archive(root, beside, interpreter="/usr/bin/env python3", compressed=True)
    beside.replace(target)
    return target
