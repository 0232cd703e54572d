"""`culm bench`: ratios of processor time, measured in interleaved rounds against an echo and a naive build."""
