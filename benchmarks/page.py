"""Puts the tables of docs/benchmarks/*.md into docs/performance.md: python benchmarks/page.py

Each stands between <!-- NAME.md --> and <!-- end -->. With --check it only tells, by its status, whether the page is up to date.
"""

import re
import sys

from measure import RESULTS

PAGE = RESULTS.parent / "performance.md"


def filled(text):
    def table(found):
        return f"<!-- {found[1]} -->\n{(RESULTS / found[1]).read_text().strip()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+\.md) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    text = PAGE.read_text()
    if "--check" in sys.argv:
        sys.exit(filled(text) != text)
    PAGE.write_text(filled(text))
