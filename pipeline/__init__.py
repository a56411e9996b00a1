"""Train image classifiers that explain themselves.

Importing this package registers its models in timm. ``contributions`` and ``explanation_mode``
explain a model; torch and timm are all they need.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.interpret.contributions import contributions, explanation_mode

__version__ = "0.1.0"
__all__ = ["contributions", "explanation_mode", "register_models"]


def register_models() -> None:
    """Make timm know the models, for which it and torch are imported."""
    import pipeline.models.coda
    import pipeline.models.coda_resnet  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.interpret import contributions

    return getattr(contributions, name)


def _is_command_line() -> bool:
    """Whether this process is ``coda ...`` or ``python -m pipeline ...``."""
    if sys.argv[:1] == ["-m"]:
        return ("-m", "pipeline") in pairwise(sys.orig_argv)
    return Path("".join(sys.orig_argv[1:2])).name == "coda"


# The command line registers them when it knows that the command needs them: `coda doctor` must run
# where torch cannot be imported.
if not _is_command_line():
    register_models()
