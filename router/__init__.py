"""The front door: verify, resolve slot to shard, forward over the link, answer in the caller's dialect."""
