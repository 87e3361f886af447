"""What a checkpoint becomes in MLX, for any model that mlx-lm knows: its own class is asked.

`expressions` records what a model class does to a checkpoint's tensors, `replay` does it again to
some rows of them, and `architecture` opens a checkpoint's model from config and headers alone.
"""
