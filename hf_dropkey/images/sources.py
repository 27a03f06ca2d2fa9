"""What the data of every image task has in common: names of splits, checks of names."""

from collections.abc import Sequence

from .checks import name_some


EVALUATION_SPLITS = ("validation", "valid", "test")
CHOICE_SEED = 0


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError if the data has class names that a model does not know."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the data has {len(unknown)} classes that the model does not know: {name_some(unknown)}; "
            f"the model knows {name_some(known)}. Use data with the model's classes"
        )
