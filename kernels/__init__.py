"""Triton kernels. They import nothing of the rest of Esper."""
