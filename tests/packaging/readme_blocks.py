"""Run the Python blocks of a README one after the other, without anything else.

python readme_blocks.py README.md
"""

import re
import sys
from pathlib import Path

FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main(page):
    """Run the blocks of a page in one namespace."""
    blocks = FENCED.findall(Path(page).read_text("utf-8"))
    if not blocks:
        sys.exit(f"{page} has no Python block.")
    namespace = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


if __name__ == "__main__":
    main(*sys.argv[1:])
