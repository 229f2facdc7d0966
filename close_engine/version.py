"""The version of this library, and of nothing else."""

__version__ = "0.1.0"
