"""A child of `run_apart` that tells how it was started."""

import os
import sys

from pydantic import BaseModel

from glm_quant.evaluation.process import serve


class Answer(BaseModel):
    switch: str | None = None


if __name__ == "__main__":
    serve(sys.argv[1:], lambda _asked, _say: Answer(switch=os.environ.get("MLX_ENABLE_TF32")))
