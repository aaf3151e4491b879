"""Write a self-contained HTML report of a run, or a comparison of several runs, from their folders.

Curves are SVG generated here. The script in the page moves a cursor over them, selects the step whose completions are
shown, and shades their tokens. All text from a model or a dataset is escaped, and the page's content security policy
forbids requests and any style or script except the two files in this package.
"""

from rlft.report.comparison import write as compare
from rlft.report.page import write

__all__ = ["compare", "write"]
