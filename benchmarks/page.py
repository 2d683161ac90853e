"""Puts the tables of docs/benchmarks/*.md into docs/performance.md and docs/results*.md: python benchmarks/page.py

Each stands between <!-- NAME.md --> and <!-- end -->. With --check it only tells, by its status, whether the pages are up to date.
"""

import re
import sys

from measure import RESULTS

PAGES = (RESULTS.parent / "performance.md", *sorted(RESULTS.parent.glob("results*.md")))


def filled(text):
    def table(found):
        return f"<!-- {found[1]} -->\n{(RESULTS / found[1]).read_text().strip()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+\.md) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    texts = {page: page.read_text() for page in PAGES}
    if "--check" in sys.argv:
        sys.exit(any(filled(text) != text for text in texts.values()))
    for page, text in texts.items():
        page.write_text(filled(text))
