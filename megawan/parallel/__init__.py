"""Context parallelism over torch.distributed; knows nothing of Wan or DeepSpeed."""
