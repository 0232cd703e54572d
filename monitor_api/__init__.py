"""The merged view over all shards."""
