"""The former place of ``pipeline.interpret.contributions``, whose public names are also here."""

from pipeline.interpret.contributions import contributions, explanation_mode

__all__ = ["contributions", "explanation_mode"]
