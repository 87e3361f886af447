"""`glm-quant fit`: which bits for which weights, measured, within a budget of bytes."""
