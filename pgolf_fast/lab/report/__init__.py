"""HTML reports of a run or an analysis, and the plots that go with them."""
