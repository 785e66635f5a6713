"""Studies: the tables and figures of the pruning paper, from many runs."""
