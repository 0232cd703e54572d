"""One partition: the server process with its own InnoDB database and Redis-cached dispatch queue."""
