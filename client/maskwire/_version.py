"""The version of the package `maskwire`."""

__version__ = "0.1.0"
