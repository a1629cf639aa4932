"""The version, in one place: read by setup.py, the package and the native library."""

__version__ = "0.1.0"
