"""Exercises on bytes, on slices of a flat buffer, and on the norm over all ranks."""

import operator

import torch
import torch.distributed as dist
from torch import nn

from . import small
from .exercise import Exercise, Mistake, Observed

# ---- bytes of model states -----------------------------------------------------------------------


def bytes_per_rank(numel, world_size, stage):
    """Bytes of model states on one rank, for Adam in mixed precision: 2 for each parameter, 2 for
    its gradient and 12 for the optimizer. numel is a multiple of world_size."""
    params, grads, states = 2 * numel, 2 * numel, 12 * numel
    if stage >= 1:
        states //= world_size
    if stage >= 2:
        grads //= world_size
    if stage >= 3:
        params //= world_size
    return params + grads + states


def _observe_bytes(answer) -> Observed:
    numel, world_size = 7_500_000_000 // 64 * 64, 64
    found: Observed = {f"7.5 B on 64 ranks, stage {stage}": answer(numel, world_size, stage)
                       for stage in range(4)}
    found["1,000 parameters on one rank, stage 3"] = answer(1000, 1, 3)
    return {what: int(n) if isinstance(n, float) and n == int(n) else
            "nothing" if n is None else n for what, n in found.items()}


def _everything_cut(numel, world_size, stage):
    return 16 * numel // world_size if stage else 16 * numel


def _only_this_stages_part(numel, world_size, stage):
    part = {1: 12, 2: 2, 3: 2}.get(stage, 0) * numel
    return 16 * numel - part + part // world_size


def _without_master(numel, world_size, stage):
    params, grads, states = 2 * numel, 2 * numel, 8 * numel
    if stage >= 1:
        states //= world_size
    if stage >= 2:
        grads //= world_size
    if stage >= 3:
        params //= world_size
    return params + grads + states


def _fp32(numel, world_size, stage):
    params, grads, states = 4 * numel, 4 * numel, 8 * numel
    if stage >= 1:
        states //= world_size
    if stage >= 2:
        grads //= world_size
    if stage >= 3:
        params //= world_size
    return params + grads + states


def _only_equal(numel, world_size, stage):
    params, grads, states = 2 * numel, 2 * numel, 12 * numel
    if stage == 3:
        params //= world_size
    if stage == 2:
        grads //= world_size
    if stage >= 1:
        states //= world_size
    return params + grads + states


def _gigabytes(numel, world_size, stage):
    return bytes_per_rank(numel, world_size, stage) / 1e9


def _all_ranks(numel, world_size, stage):
    return bytes_per_rank(numel, world_size, stage) * world_size


def _params_before_grads(numel, world_size, stage):
    params, grads, states = 2 * numel, 2 * numel, 12 * numel
    if stage >= 1:
        params //= world_size
    if stage >= 2:
        grads //= world_size
    if stage >= 3:
        states //= world_size
    return params + grads + states


# ---- a flat buffer and its slices ----------------------------------------------------------------


def _observe_bounds(answer) -> Observed:
    bounds = answer(12, 4, 1)
    try:
        _begin, _end = map(operator.index, bounds)
        pair = "two whole numbers"
    except (TypeError, ValueError):
        pair = repr(bounds)
    found: Observed = {"what is returned": pair}
    if pair == "two whole numbers":
        for numel, n in ((12, 4), (10, 4), (5, 4), (2, 4), (7, 1), (9, 3)):
            bounds = [tuple(map(operator.index, answer(numel, n, rank))) for rank in range(n)]
            found[f"{numel} elements, world_size {n}"] = [  # an empty slice may lie anywhere
                "empty" if 0 <= b == e <= numel else (b, e) for b, e in bounds]
    return found


def _rounded_down(numel, world_size, rank):
    size = numel // world_size
    return rank * size, (rank + 1) * size


def _last_takes_the_rest(numel, world_size, rank):
    size = numel // world_size
    return rank * size, numel if rank == world_size - 1 else (rank + 1) * size


def _beyond_the_end(numel, world_size, rank):
    size = -(-numel // world_size)
    return rank * size, (rank + 1) * size


def _only_the_end_is_cut(numel, world_size, rank):
    size = -(-numel // world_size)
    return rank * size, min((rank + 1) * size, numel)


def _inclusive(numel, world_size, rank):
    begin, end = small.shard_bounds(numel, world_size, rank)
    return begin, end - 1


def _evenly(numel, world_size, rank):
    return rank * numel // world_size, (rank + 1) * numel // world_size


def _first_ones_get_one_more(numel, world_size, rank):
    size, left_over = divmod(numel, world_size)
    begin = rank * size + min(rank, left_over)
    return begin, begin + size + (rank < left_over)


def _begin_and_size(numel, world_size, rank):
    begin, end = small.shard_bounds(numel, world_size, rank)
    return begin, end - begin


def _observe_flatten(answer) -> Observed:
    world_size = dist.get_world_size()
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    values = torch.cat([p.detach().flatten() for p in layer.parameters()])
    params = list(layer.parameters())
    flat = answer(params, world_size)
    if not isinstance(flat, torch.Tensor):
        return {"what is returned": type(flat).__name__}
    numel, after = values.numel(), flat.detach().clone()
    inside = [p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in params]
    flat.detach().zero_()
    return {"what is returned": "Tensor", "shape of the buffer": tuple(flat.shape),
            "its first elements": after[:numel], "the padding": after[numel:].tolist(),
            "shapes of the parameters": [tuple(p.shape) for p in params],
            "the parameters lie in the buffer": all(inside),
            "the module follows the buffer": all(not p.any() for p in params),
            "the buffer requires a gradient": flat.requires_grad,
            "with other parameters and another world_size": _shape_and_dtype(
                answer(list(nn.Linear(3, 2, dtype=torch.bfloat16).parameters()), 5))}


def _shape_and_dtype(flat):
    return f"{tuple(flat.shape)} of {flat.dtype}" if isinstance(flat, torch.Tensor) else "nothing"


def _concatenated(params, world_size):
    flat = torch.cat([p.data.flatten() for p in params])
    return nn.functional.pad(flat, (0, -flat.numel() % world_size))


def _not_padded(params, world_size):
    flat = torch.cat([p.data.flatten() for p in params])
    start = 0
    for p in params:
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return flat


def _one_whole_slice_of_padding(params, world_size):
    flat = torch.cat([p.data.flatten() for p in params])
    flat = nn.functional.pad(flat, (0, world_size - flat.numel() % world_size))
    start = 0
    for p in params:
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return flat


def _without_shapes(params, world_size):
    flat = torch.cat([p.data.flatten() for p in params])
    flat = nn.functional.pad(flat, (0, -flat.numel() % world_size))
    start = 0
    for p in params:
        p.data = flat[start : start + p.numel()]
        start += p.numel()
    return flat


def _values_not_copied(params, world_size):
    numel = sum(p.numel() for p in params)
    flat, start = torch.zeros(numel + -numel % world_size), 0
    for p in params:
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return flat


def _each_padded(params, world_size):
    sizes = [p.numel() + -p.numel() % world_size for p in params]
    flat, start = torch.zeros(sum(sizes)), 0
    for p, size in zip(params, sizes):
        view = flat[start : start + p.numel()].view(p.shape)
        view.copy_(p.data)
        p.data = view
        start += size
    return flat


def _all_at_the_beginning(params, world_size):
    numel = sum(p.numel() for p in params)
    flat = torch.zeros(numel + -numel % world_size)
    for p in params:
        view = flat[: p.numel()].view(p.shape)
        view.copy_(p.data)
        p.data = view
    return flat


# ---- the norm over all ranks ---------------------------------------------------------------------


def global_norm(grads, group):
    """grads: this rank's slices of the gradients, 1-D, some may be empty → the 2-norm of all
    elements on all ranks, a tensor, the same on every rank."""
    total = sum((grad.square().sum() for grad in grads), torch.zeros(()))
    dist.all_reduce(total, group=group)
    return total.sqrt()


def _observe_norm(answer) -> Observed:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    grads = [torch.full((3,), rank + 1.0), torch.ones(rank), torch.empty(0)]
    norm = answer(grads, dist.group.WORLD)
    empty = answer([torch.full((1,), 3.0)] if rank == 0 else [], dist.group.WORLD)
    before = [torch.full((3,), rank + 1.0), torch.ones(rank), torch.empty(0)]
    return {f"the norm on {world_size} ranks": _rounded(norm),
            "the norm where only rank 0 has a gradient": _rounded(empty),
            "the gradients are as they were": all(map(torch.equal, grads, before))}


def _rounded(norm):
    if norm is None:
        return "nothing"
    if isinstance(norm, torch.Tensor) and norm.numel() != 1:
        return f"a tensor of shape {tuple(norm.shape)}"
    return round(float(norm), 4)


def _local(grads, group):
    return sum((grad.square().sum() for grad in grads), torch.zeros(())).sqrt()


def _sum_of_norms(grads, group):
    total = _local(grads, group)
    dist.all_reduce(total, group=group)
    return total


def _without_root(grads, group):
    total = sum((grad.square().sum() for grad in grads), torch.zeros(()))
    dist.all_reduce(total, group=group)
    return total


def _mean(grads, group):
    total = sum((grad.square().sum() for grad in grads), torch.zeros(()))
    dist.all_reduce(total, group=group)
    return (total / dist.get_world_size(group)).sqrt()


def _norm_per_parameter(grads, group):
    norms = [grad.norm() for grad in grads]
    total = sum(norms, torch.zeros(())).square()
    dist.all_reduce(total, group=group)
    return total.sqrt()


def _skips_when_empty(grads, group):
    if not grads:
        return torch.zeros(())
    return global_norm(grads, group)


_PADDED = "Pad with zeros up to the next multiple of world_size, and not at all if it is one."

ON_NUMBERS = {
    "0.1": Exercise(
        "a function (numel, world_size, stage) → bytes", _observe_bytes, bytes_per_rank, [
            Mistake(_everything_cut, "That cuts everything at every stage. Stage 1 cuts the "
                    "optimizer's 12 bytes only, stage 2 the gradients' 2 as well, and only stage 3 "
                    "the parameters' 2."),
            Mistake(_only_this_stages_part, "Each stage keeps what the stage before has cut, and "
                    "cuts one thing more."),
            Mistake(_without_master, "Adam in mixed precision keeps three values of 4 bytes for "
                    "each parameter: exp_avg, exp_avg_sq and the master copy."),
            Mistake(_fp32, "That is training in fp32: 4 + 4 + 8. In mixed precision parameters and "
                    "gradients have 2 bytes, and the optimizer keeps three values of 4."),
            Mistake(_only_equal, "Stage 3 cuts the gradients, too: what stage 2 has cut stays "
                    "cut."),
            Mistake(_gigabytes, "Right, but in gigabytes. The answer has to be in bytes."),
            Mistake(_all_ranks, "That is the sum over all ranks. The answer is for one rank."),
            Mistake(_params_before_grads, "The stages cut optimizer states first, then gradients, "
                    "then parameters."),
        ],
        {f"7.5 B on 64 ranks, stage {stage}": "Add up 2 + 2 + 12 bytes for each parameter, and "
         "divide what this stage cuts by world_size." for stage in range(4)}, (1,)),
    "3.1": Exercise(
        "a function (numel, world_size, rank) → (begin, end)", _observe_bounds, small.shard_bounds,
        [
            Mistake(_rounded_down, "Rounded down, the last elements belong to nobody, and would "
                    "never be updated. Round up."),
            Mistake(_last_takes_the_rest, "All elements have an owner, but the last rank has more "
                    "than the others. Here all have ceil(numel / world_size), and the last ones "
                    "what is left."),
            Mistake(_beyond_the_end, "The last slice reaches beyond the end of the buffer. No "
                    "bound may be larger than numel."),
            Mistake(_only_the_end_is_cut, "An empty slice must not begin beyond the end, and its "
                    "begin must not be larger than its end: neither bound may exceed numel."),
            Mistake(_inclusive, "`end` is the first element that no longer belongs to this rank, "
                    "as in flat[begin:end]."),
            Mistake(_evenly, "That spreads the remainder over the ranks. A collective needs equal "
                    "slices: all have ceil(numel / world_size) elements, and the last ones what is "
                    "left."),
            Mistake(_first_ones_get_one_more, "That gives the first ranks one element more. A "
                    "collective needs equal slices: all have ceil(numel / world_size) elements, "
                    "and the last ones what is left."),
            Mistake(_begin_and_size, "The second number is the end, not the size."),
        ],
        {"what is returned": "Return two whole numbers, begin and end. (// divides whole numbers.)",
         "12 elements, world_size 4": "Without a remainder each rank has numel / world_size.",
         "10 elements, world_size 4": "Ten elements on four ranks: 3, 3, 3 and 1.",
         "5 elements, world_size 4": "Five elements on four ranks: 2, 2, 1 and none.",
         "2 elements, world_size 4": "Two elements on four ranks: 1, 1, none and none."}, (1,)),
    "3.2": Exercise(
        "a function (params, world_size) → the flat buffer", _observe_flatten, small.flatten, [
            Mistake(_concatenated, "The buffer is right, but the parameters still lie where they "
                    "were. Each has to become a view of its place in the buffer."),
            Mistake(_not_padded, "The buffer cannot be cut into equal slices. " + _PADDED,
                    None),
            Mistake(_one_whole_slice_of_padding, _PADDED),
            Mistake(_without_shapes, "The parameters have become 1-D. Give the views the "
                    "parameters' shapes: .view(p.shape)."),
            Mistake(_values_not_copied, "The parameters' values are lost. Copy them into the "
                    "buffer before you point the parameters there."),
            Mistake(_each_padded, "There is padding behind each parameter. The parameters follow "
                    "one another, and the padding comes once, at the end of the buffer."),
            Mistake(_all_at_the_beginning, "All parameters begin at element 0. Each begins where "
                    "the one before it ends."),
        ],
        {"what is returned": "Return the buffer.", "shape of the buffer": _PADDED,
         "its first elements": "The buffer begins with the parameters' values, one after another.",
         "the padding": "The padding at the end is zeros.",
         "the parameters lie in the buffer": "Each parameter has to be a view of its place in the "
         "buffer.",
         "with other parameters and another world_size": "Use the parameters' own dtype, and the "
         "world_size that is given.",
         "the buffer requires a gradient": "Copy p.data, not p: the buffer has no gradient."}),
    "7.1": Exercise(
        "a function (grads, group) → the norm", _observe_norm, global_norm, [
            Mistake(_local, "That is the norm of this rank's slices. Each rank would clip by a "
                    "different norm, and the weights would no longer belong to one model."),
            Mistake(_sum_of_norms, "You add up norms. Norms do not add up: their squares do. Sum "
                    "the squares over the ranks first, and take the root last."),
            Mistake(_without_root, "The root is missing."),
            Mistake(_mean, "The sum of squares must not be divided by the number of ranks: every "
                    "element is on exactly one rank."),
            Mistake(_norm_per_parameter, "Within a rank, too, the squares are added up, not the "
                    "norms of the parameters."),
            Mistake(_skips_when_empty, "Every rank takes part in the all_reduce, even one that "
                    "owns nothing at all.", "stuck"),
        ],
        {"the gradients are as they were": "The gradients themselves must not be changed."}),
}
