"""What a compressor does, written as one dense float64 matrix on the flattened gradient."""

import torch


def matrix_of(linear_map):
    """[out, in], column by column."""
    return linear_map.columns(torch.arange(linear_map.in_size)).double().t()


def dense_matrix(compressor):
    """[size, out * in]: row j holds what number j of the compressed gradient takes from each entry of the matrix."""
    left, right, tail = (matrix_of(one) for one in (compressor.left, compressor.right, compressor.tail))
    if compressor.product == "entrywise":
        rows = [torch.outer(left[k], right[k]).flatten() for k in range(len(left))]
        return tail @ torch.stack(rows)
    if compressor.product == "outer":
        rows = [torch.outer(a, b).flatten() for a in left for b in right]
        return tail @ torch.stack(rows)
    size = len(left)
    middle = torch.zeros(size, left.shape[1] * right.shape[1], dtype=torch.float64)
    for a in range(size):
        for b in range(size):
            middle[(a + b) % size] += torch.outer(left[a], right[b]).flatten()
    return tail @ middle


def gradient_from_factors(left, right):
    """[example, out, in], token by token."""
    total = torch.zeros(left.shape[0], left.shape[2], right.shape[2], dtype=torch.float64)
    for token in range(left.shape[1]):
        total += left[:, token, :, None].double() * right[:, token, None, :].double()
    return total
