"""Runs the Python examples of README.md in order, in one namespace: they must not rot."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path.insert(0, str(ROOT))
    text = (ROOT / "README.md").read_text()
    namespace: dict = {"__name__": "__readme__"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        # Padded, so that a traceback names the README's own line.
        exec(compile("\n" * line + block.group(1), "README.md", "exec"), namespace)
    if not blocks:
        sys.exit("README.md has no Python example")
    print(f"README.md: {len(blocks)} examples ran")


if __name__ == "__main__":
    main()
