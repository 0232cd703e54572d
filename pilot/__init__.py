"""The pilot: runs on a worker node, pulls jobs, runs their payloads, reports. Standard library only."""

__version__ = "0.1.0"
