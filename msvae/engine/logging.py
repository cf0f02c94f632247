"""Names that `msvae.engine.verdict` looks for here."""

from msvae.engine.log.json_lines import VALIDATION, whole_lines

__all__ = ["VALIDATION", "whole_lines"]
