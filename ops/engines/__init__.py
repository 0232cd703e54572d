"""Servers that a cluster on one machine brings along: an InnoDB engine and a Valkey per shard."""
