"""One HTML file about a run, or about several compared, from their folders: no network, no library, no account.

Curves are SVG drawn here; the script in the page moves a cursor over them, chooses the step whose completions are shown
and shades their tokens. Everything that came from a model or a dataset is escaped; the page's policy forbids it any
request, and any style or script but the two files beside this one.
"""

from rlft.report.comparison import write as compare
from rlft.report.page import write

__all__ = ["compare", "write"]
