"""Draws the figure of the method in the README: the masks of all patterns for one seed, the schedules over depth.

python scripts/draw_method.py model_cards/figures/method.png
"""

import sys

import torch

from hf_dropkey import layer_ratios
from hf_dropkey.models.dropkey import PATTERNS, SCHEDULES, dropped_scores
from hf_dropkey.plots import method_overview


GRID = (6, 6)
RATIO = 0.3
DEPTH = 12


def main() -> None:
    """Runs the job."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    keys = 1 + GRID[0] * GRID[1]
    seed = torch.tensor([0, 1], dtype=torch.int32)
    patterns = {
        name: dropped_scores(seed, (1, 1, keys, keys), RATIO, pattern=name, window=2, grid=GRID)
        .expand(1, 1, keys, keys)[0, 0]
        .numpy()
        for name in PATTERNS
    }

    schedules = {name: layer_ratios(DEPTH, RATIO, schedule=name) for name in SCHEDULES}
    method_overview(patterns, schedules).savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
