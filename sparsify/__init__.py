"""Sparsity: which key tiles attention visits and which cached tokens are kept."""
