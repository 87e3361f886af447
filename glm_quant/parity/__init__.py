"""Parity: the build computes what the reference computes, or the flow stops.

`check.check_parity` returns a record, or raises with the layer, the measure and both numbers. Three
comparisons: our runtime on the source's own weights against transformers, layer by layer (see
`stream`); the same as whole-model logits where the model is small; and the quantized build against
the reference.
"""
