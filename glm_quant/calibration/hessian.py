"""From the sums of a calibration pass to what the quantizers use: importances, Hessian factors."""

import numpy as np
from numpy.typing import NDArray

# Share of H's mean diagonal that is added to it; 0.01, 0.1 and 0.5 gave nearly the same KL.
DAMPING = 0.1
# No importance is below this share of its row's median or mean: a column that calibration hardly
# excited may matter for other texts.
_FLOOR = 1e-4


def cholesky_factor(gram: NDArray[np.float64], count: int) -> NDArray[np.float32]:
    """Return the upper Cholesky factor U of a damped H⁻¹ = Uᵀ·U.

    Args:
        gram: Σx xᵀ, [width, width].
        count: of how many tokens.

    Raises:
        numpy.linalg.LinAlgError: never for what is a sum of x xᵀ, since it is damped.
    """
    size = float(np.trace(gram)) / len(gram)
    if size <= 0:  # without inputs no column predicts another
        return np.eye(len(gram), dtype=np.float32)
    damped = gram / max(count, 1)
    damped[np.diag_indices_from(damped)] += DAMPING * size / max(count, 1)
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32))


def importances(
    sums: NDArray[np.float64], counts: NDArray[np.int64], least: int
) -> tuple[NDArray[np.float32], int]:
    """Turn sums of squares into importances, E[x²] with mean 1 for each unit.

    Args:
        sums: Σx² over the tokens that each unit met, [units, width].
        counts: how many tokens these were, [units].
        least: a unit that met fewer has the mean of all tokens of all units.

    Returns:
        Importances [units, width], and how many units were thin.
    """
    thin = counts < least
    values = np.empty(sums.shape, np.float64)
    values[~thin] = sums[~thin] / counts[~thin, None]
    values[thin] = sums.sum(axis=0) / max(int(counts.sum()), 1)
    silent = values.max(axis=1) <= 0  # no token at all: all columns count alike
    values[silent] = 1
    floor = np.maximum(np.median(values, axis=1), values.mean(axis=1)) * _FLOOR
    values = np.maximum(values, floor[:, None])
    values /= values.mean(axis=1, keepdims=True)
    return values.astype(np.float32), int(thin.sum())
