"""What messages and pages say about installing: the name on the public index is another project's."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nobody_is_sent_to_the_public_index_for_esper() -> None:
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "esper").rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in texts
        for line in path.read_text().splitlines()
        if re.search(r"pip install\W+esper\b|esper\[\w", line) and "another project" not in line
    ]
    assert found == []
