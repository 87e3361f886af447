"""Calibration: what each weight's inputs look like, by a streamed pass of the source."""
