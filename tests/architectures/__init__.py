"""Tests over many architectures, and the small checkpoints that they are made of."""
