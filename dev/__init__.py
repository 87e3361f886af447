"""What made the checkpoint, the items and the texts that ship: run by hand, not in the wheel."""
