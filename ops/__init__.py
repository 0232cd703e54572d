"""The cluster on one machine, the command line, topology changes, the audit."""
