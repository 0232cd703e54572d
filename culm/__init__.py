"""The shared contract: what every process of culm agrees on."""

__version__ = "0.1.0"
