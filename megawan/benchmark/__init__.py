"""What tools/benchmark.py measures: our step beside others', context parallelism, the loop, the disk."""
