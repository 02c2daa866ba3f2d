"""Every algorithm in plain torch: what runs without a GPU, and where a kernel does not go."""
