"""A cluster on one machine: a supervisor over processes that also run alone."""
