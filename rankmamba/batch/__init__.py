"""Studies in batch: their parameters, what they will take, many of them from one file, on a cluster. `rankmamba.study` runs one."""
