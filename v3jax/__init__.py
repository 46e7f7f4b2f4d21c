"""DeepSeek-V3, the whole training system, in JAX."""
