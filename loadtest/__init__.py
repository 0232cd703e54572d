"""Replayed and generated load, as real clients over HTTP."""
