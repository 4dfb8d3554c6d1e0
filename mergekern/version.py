"""The version of this package, for those that may not import the package itself."""

__version__ = "0.1.0"
