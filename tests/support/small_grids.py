"""A grid of runs that take a second each, for the tests of the laboratory."""

from typing import Any

from small_runs import TINY


RECIPE: dict[str, Any] = {
    **TINY,
    "image_size": 8,
    "patch_size": 2,
    "do_train": True,
    "max_steps": 4,
    "max_train_samples": 64,
    "max_eval_samples": 40,
    "per_device_train_batch_size": 16,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
GRID: dict[str, Any] = {
    "about": "tests",
    "task": "digits",
    "recipe": "recipe.json",
    "models": {"tiny": {}},
    "seeds": [0, 1],
    "select_by": "nll",
    "occlusion_patch": 2,
    "cells": [
        {"regulariser": "none"},
        {"regulariser": "dropkey", "ratio": [0.1, 0.5], "alignment": ["none", "monte-carlo"]},
    ],
}
ORIGIN = {"command": "c", "git_sha": "abc", "transformers": "5", "torch": "2", "device": "cpu", "threads": "1"}
