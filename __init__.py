"""kompakt: post-training compression of Hugging Face models, from weights to attention to the key-value cache."""

__version__ = "0.1.0"
