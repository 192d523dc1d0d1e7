"""`signal` as the C module has it: plain numbers instead of enumerations."""

from _signal import *  # type: ignore[import-not-found]  # noqa: F403 - this module stands in for the standard library's
