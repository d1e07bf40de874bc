"""The system around the kernels: from event logs to user embeddings, similarity graphs and ad candidates."""
