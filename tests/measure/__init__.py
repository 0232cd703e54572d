"""Measurements of one shard on private servers: commands, not tests. What they said is in docs/performance.md."""
