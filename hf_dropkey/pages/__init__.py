"""One page about a run, `report.html`: what is measured for it, its figures, its HTML."""
