"""Mycel trains, tunes, aligns, compresses, retrieves for and serves models on machines that do not belong together."""

from importlib.metadata import version

__version__ = version("mycel")
