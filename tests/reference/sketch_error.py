"""Errors of inner products, one pair after another, in plain Python numbers."""

import math

from scipy.stats import pearsonr, spearmanr


def errors(estimate, exact, first_norms, second_norms):
    """The six measures of `vestige.evaluate.quality`, in its order."""
    per_row, squares, cosines = [], [], []
    for i, row in enumerate(exact):
        row_errors = []
        for j, right in enumerate(row):
            error = float(estimate[i][j]) - float(right)
            row_errors.append(error**2)
            squares.append(float(right) ** 2)
            cosines.append((error / (float(first_norms[i]) * float(second_norms[j]))) ** 2)
        per_row.append(math.sqrt(sum(row_errors) / len(row_errors)))
    mean = sum(per_row) / len(per_row)
    spread = math.sqrt(sum((one - mean) ** 2 for one in per_row) / len(per_row))
    relative = mean / math.sqrt(sum(squares) / len(squares))
    nrmse = math.sqrt(sum(cosines) / len(cosines))
    pairs = list(zip(estimate, exact, strict=True))
    spearman = sum(float(spearmanr(a, b).statistic) for a, b in pairs) / len(pairs)
    pearson = sum(float(pearsonr(a, b).statistic) for a, b in pairs) / len(pairs)
    return mean, spread, relative, nrmse, spearman, pearson
