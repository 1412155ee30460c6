"""The model: gates, recurrences, the attention module, and the pure step and prefill functions."""
