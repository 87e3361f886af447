"""The command line `glm-quant`, a file a family of commands."""
