"""Quantization methods: one file, one frozen dataclass, whose fields are the recipe's options."""
