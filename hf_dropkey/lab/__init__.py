"""This project's own evidence: grids of runs, their rows, tables, cards and figures."""
