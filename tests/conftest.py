import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The Triton kernels run on CPU tensors. Triton reads this when it decorates, so it comes before any import of it.
os.environ.setdefault("TRITON_INTERPRET", "1")
