"""Exercises on collectives that are made of sending and receiving."""

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import Exchange
from .exercise import Exercise, Mistake, Observed

# ---- the solutions -------------------------------------------------------------------------------


def ring_reduce_scatter(flat, rank, world_size, exchange):
    """flat: (world_size * n,) → slice `rank` of the sum over all ranks, (n,)."""
    slices = list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size):
        came = torch.empty_like(slices[0])
        exchange(send={right: slices[rank - k]}, recv={left: came})
        slices[rank - k - 1] += came
    return slices[rank]


def ring_all_gather(own, rank, world_size, exchange):
    """own: (n,), this rank's slice → (world_size * n,), everyone's."""
    slices = [own if r == rank else torch.empty_like(own) for r in range(world_size)]
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(world_size - 1):
        exchange(send={right: slices[rank - k]}, recv={left: slices[rank - k - 1]})
    return torch.cat(slices)


def sum_in_rank_order(flat, rank, world_size, exchange):
    """flat: (world_size * n,) → slice `rank` of the sum, (n,), added up in rank order."""
    slices = flat.chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(slices[0]) for r in others}
    exchange(send={r: slices[r] for r in others}, recv=parts)
    parts[rank] = slices[rank]
    total = parts[0].clone()
    for r in range(1, world_size):
        total += parts[r]
    return total


# ---- what an answer is run on --------------------------------------------------------------------


def _traffic(exchange: Exchange, world_size: int) -> Observed:
    right = (dist.get_rank() + 1) % world_size
    return {"rounds": exchange.rounds, "bytes sent": exchange.bytes,
            "most messages in a round": exchange.at_once,
            "sends to its right neighbour alone": exchange.partners == {right}}


def _result(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    return "nothing" if value is None else value


def _observe_ring_reduce_scatter(answer) -> Observed:
    rank, world_size, exchange = dist.get_rank(), dist.get_world_size(), Exchange()
    flat = (torch.arange(2.0 * world_size) + 1) * 10**rank  # whole numbers: any order is right
    before = flat.clone()
    result = _result(answer(flat, rank, world_size, exchange))
    return {"the result": result, **_traffic(exchange, world_size),
            "flat is as it was": torch.equal(flat, before)}


def _observe_ring_all_gather(answer) -> Observed:
    rank, world_size, exchange = dist.get_rank(), dist.get_world_size(), Exchange()
    own = torch.tensor([1.0, 2.0]) + 10 * rank
    result = _result(answer(own, rank, world_size, exchange))
    return {"the result": result, **_traffic(exchange, world_size)}


def _observe_sum_in_rank_order(answer) -> Observed:
    rank, world_size, exchange = dist.get_rank(), dist.get_world_size(), Exchange()
    # Of each slice, the first element tells which slice it is, and the sum of the second depends on
    # the order.
    flat = torch.full((2 * world_size,), [1e8, 1.0, -1e8, 3.0][rank])
    flat[::2] = torch.arange(float(world_size)) * 100 + rank
    before = flat.clone()
    result = _result(answer(flat, rank, world_size, exchange))
    return {"the result": result, "rounds": exchange.rounds, "bytes sent": exchange.bytes,
            "flat is as it was": torch.equal(flat, before)}


# ---- wrong answers -------------------------------------------------------------------------------


def _whole_buffer_around(flat, rank, world_size, exchange):
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    total, passing = flat.clone(), flat
    for _ in range(world_size - 1):
        came = torch.empty_like(flat)
        exchange(send={right: passing}, recv={left: came})
        total += came
        passing = came
    return total.chunk(world_size)[rank]


def _one_slice_too_early(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(world_size - 1):
        came = torch.empty_like(slices[0])
        exchange(send={right: slices[rank - k]}, recv={left: came})
        slices[rank - k - 1] += came
    return slices[rank]


def _replaces(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size):
        exchange(send={right: slices[rank - k].clone()}, recv={left: slices[rank - k - 1]})
    return slices[rank]


def _one_round_too_many(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size + 1):
        came = torch.empty_like(slices[0])
        exchange(send={right: slices[(rank - k) % world_size]}, recv={left: came})
        slices[(rank - k - 1) % world_size] += came
    return slices[rank]


def _one_round_too_few(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size - 1):
        came = torch.empty_like(slices[0])
        exchange(send={right: slices[rank - k]}, recv={left: came})
        slices[rank - k - 1] += came
    return slices[rank]


def _in_place(flat, rank, world_size, exchange):
    slices = list(flat.chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size):
        came = torch.empty_like(slices[0])
        exchange(send={right: slices[rank - k]}, recv={left: came})
        slices[rank - k - 1] += came
    return slices[rank]


def _both_ways(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    right = (rank + 1) % world_size
    for k in range(1, world_size):
        came = torch.empty_like(slices[0])
        exchange(send={right: slices[rank - k]}, recv={right: came})
        slices[rank - k - 1] += came
    return slices[rank]


def _passes_its_own_on(flat, rank, world_size, exchange):
    own, slices = flat.chunk(world_size), list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size):
        came = torch.empty_like(slices[0])
        exchange(send={right: own[rank - k]}, recv={left: came})
        slices[rank - k - 1] += came
    return slices[rank]


def _mean_around(flat, rank, world_size, exchange):
    return ring_reduce_scatter(flat, rank, world_size, exchange) / world_size


def _beyond_the_list(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size):
        came = torch.empty_like(slices[0])
        exchange(send={right: slices[rank + k]}, recv={left: came})
        slices[rank - k - 1] += came
    return slices[rank]


def _receives_nothing(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    for k in range(1, world_size):
        exchange(send={(rank + 1) % world_size: slices[rank - k]}, recv={})
    return slices[rank]


def _room_for_all(flat, rank, world_size, exchange):
    slices = list(flat.clone().chunk(world_size))
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(1, world_size):
        came = torch.empty_like(flat)
        exchange(send={right: slices[rank - k]}, recv={left: came})
        slices[rank - k - 1] += came
    return slices[rank]


def _without_own_part(flat, rank, world_size, exchange):
    slices = flat.chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(slices[0]) for r in others}
    exchange(send={r: slices[r] for r in others}, recv=parts)
    return sum(parts[r] for r in range(world_size))


def _whole_buffers_to_slices(flat, rank, world_size, exchange):
    slices = flat.chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(slices[0]) for r in others}
    exchange(send={r: flat for r in others}, recv=parts)
    return slices[rank]


def _direct_reduce_scatter(flat, rank, world_size, exchange):
    return sum_in_rank_order(flat, rank, world_size, exchange)


def _gather_to_all(own, rank, world_size, exchange):
    slices = [own if r == rank else torch.empty_like(own) for r in range(world_size)]
    others = [r for r in range(world_size) if r != rank]
    exchange(send={r: own for r in others}, recv={r: slices[r] for r in others})
    return torch.cat(slices)


def _always_its_own(own, rank, world_size, exchange):
    slices = [own if r == rank else torch.empty_like(own) for r in range(world_size)]
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    for k in range(world_size - 1):
        exchange(send={right: own}, recv={left: slices[rank - k - 1]})
    return torch.cat(slices)


def _in_order_of_arrival(own, rank, world_size, exchange):
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    slices = [own]
    for _ in range(world_size - 1):
        came = torch.empty_like(own)
        exchange(send={right: slices[-1]}, recv={left: came})
        slices.append(came)
    return torch.cat(slices)


def _one_round(own, rank, world_size, exchange):
    slices = [own if r == rank else torch.zeros_like(own) for r in range(world_size)]
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    exchange(send={right: own}, recv={left: slices[left]})
    return torch.cat(slices)


def _gather_both_ways(own, rank, world_size, exchange):
    slices = [own if r == rank else torch.empty_like(own) for r in range(world_size)]
    right = (rank + 1) % world_size
    for k in range(world_size - 1):
        exchange(send={right: slices[rank - k]}, recv={right: slices[rank - k - 1]})
    return torch.cat(slices)


def _own_first(flat, rank, world_size, exchange):
    slices = flat.chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(slices[0]) for r in others}
    exchange(send={r: slices[r] for r in others}, recv=parts)
    total = slices[rank].clone()
    for r in others:
        total += parts[r]
    return total


def _whole_buffers(flat, rank, world_size, exchange):
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(flat) for r in others}
    exchange(send={r: flat for r in others}, recv=parts)
    parts[rank] = flat
    total = parts[0].clone()
    for r in range(1, world_size):
        total += parts[r]
    return total.chunk(world_size)[rank]


def _own_slice_to_all(flat, rank, world_size, exchange):
    slices = flat.chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(slices[0]) for r in others}
    exchange(send={r: slices[rank] for r in others}, recv=parts)
    parts[rank] = slices[rank]
    total = parts[0].clone()
    for r in range(1, world_size):
        total += parts[r]
    return total


def _in_float64(flat, rank, world_size, exchange):
    slices = flat.double().chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(flat.chunk(world_size)[0]) for r in others}
    exchange(send={r: flat.chunk(world_size)[r] for r in others}, recv=parts)
    return sum(slices[r] if r == rank else parts[r].double() for r in range(world_size))


def _rounded_from_float64(flat, rank, world_size, exchange):
    return _in_float64(flat, rank, world_size, exchange).float()


def _own_part_twice(flat, rank, world_size, exchange):
    return sum_in_rank_order(flat, rank, world_size, exchange) + flat.chunk(world_size)[rank]


def _own_part_first_and_in_its_turn(flat, rank, world_size, exchange):
    slices = flat.chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(slices[0]) for r in others}
    exchange(send={r: slices[r] for r in others}, recv=parts)
    total = slices[rank].clone()
    for r in range(world_size):
        total += slices[rank] if r == rank else parts[r]
    return total


def _without_its_own(flat, rank, world_size, exchange):
    slices = flat.chunk(world_size)
    others = [r for r in range(world_size) if r != rank]
    parts = {r: torch.empty_like(slices[0]) for r in others}
    exchange(send={r: slices[r] for r in others}, recv=parts)
    total = torch.zeros_like(slices[0])
    for r in others:
        total += parts[r]
    return total


_UNEXPECTED = ("What is sent in a round has to be received in the same round: recv={…} names the "
               "rank that it comes from.")
_ROOM = "A message has one size on both sides. What travels here is one slice."
_TO_THE_RIGHT = ("In this ring every rank sends to its right neighbour, (rank + 1) % world_size, "
                 "and to nobody else.")
_NOBODY_SENDS = ("In each round a message goes from a rank to its right neighbour, so what a rank "
                 "receives comes from its left one.")

_FLOAT64 = ("In float64 an addition rounds differently. The target is the bits of the buffer's own "
            "dtype.")
_TWICE = "Your own part of the slice is in the sum twice."

ON_COLLECTIVES = {
    "1.1": Exercise(
        "a function (flat, rank, world_size, exchange) → this rank's slice of the sum",
        _observe_ring_reduce_scatter, ring_reduce_scatter, [
            Mistake(_whole_buffer_around, "The sum is right, but in each round you send a whole "
                    "buffer. A slice is enough: send the one that you have just added to."),
            Mistake(_one_slice_too_early, "The result is your own values: nothing has been added "
                    "to the slice that you return. It must be the last one that you add to. Which "
                    "slice do you send in the first round, if its journey is to end at its owner "
                    "after world_size - 1 rounds?"),
            Mistake(_replaces, "What arrives replaces your own values. In a reduce_scatter, it has "
                    "to be added to them; in an all_gather, it replaces them."),
            Mistake(_one_round_too_many, "One round too many: after world_size - 1 rounds every "
                    "rank has added to a slice, and a further round adds something twice."),
            Mistake(_one_round_too_few, "A slice has to pass through all ranks: that takes "
                    "world_size - 1 rounds."),
            Mistake(_in_place, "The result is right, but `flat` has changed: the chunks are views "
                    "of it. Work on a copy."),
            Mistake(_direct_reduce_scatter, "The sum and the bytes are right, but that is direct "
                    "exchange: in a ring a rank sends to its right neighbour only, in world_size - "
                    "1 rounds."),
            Mistake(_passes_its_own_on, "You send this rank's original values on. What travels is "
                    "the sum so far: send the slice that you have just added to."),
            Mistake(_mean_around, "That is the mean. A reduce_scatter sums; whoever wants the mean "
                    "divides afterwards."),
            Mistake(_both_ways, _NOBODY_SENDS, "waits for a message from rank"),
            Mistake(_receives_nothing, _UNEXPECTED, "does not wait for a message"),
            Mistake(_room_for_all, _ROOM, "has made room for"),
            Mistake(_beyond_the_list, "A ring has no end: take the index % world_size. (Negative "
                    "indices count from the end of a list, which is a ring, too.)",
                    "index out of range"),
        ],
        {"the result": "Write down for two ranks, round by round, which slice each of them sends.",
         "rounds": "A slice takes world_size - 1 steps around the ring, and each step is one call "
         "of exchange.",
         "sends to its right neighbour alone": _TO_THE_RIGHT,
         "flat is as it was": "Work on a copy: `flat` is the caller's.",
         "bytes sent": "(N-1)/N of the buffer: one slice in each of N - 1 rounds."}),
    "1.2": Exercise(
        "a function (own, rank, world_size, exchange) → everyone's slices, in rank order",
        _observe_ring_all_gather, ring_all_gather, [
            Mistake(_gather_to_all, "The result and the bytes are right, but that is direct "
                    "exchange: in a ring a rank sends to its right neighbour only, in world_size - "
                    "1 rounds."),
            Mistake(_always_its_own, "You send your own slice in every round, so your right "
                    "neighbour gets it again and again. From the second round on, pass on what has "
                    "just arrived."),
            Mistake(_in_order_of_arrival, "All slices are there, but in the order in which they "
                    "arrived. What comes in round k (counted from 0) is the slice of rank "
                    "rank - k - 1: put it in that place."),
            Mistake(_one_round, "After one round you have your left neighbour's slice. The others "
                    "have to travel on: world_size - 1 rounds."),
            Mistake(_gather_both_ways, _NOBODY_SENDS, "waits for a message from rank"),
        ],
        {"the result": "Which rank's slice arrives in round k?",
         "rounds": "A slice takes world_size - 1 steps around the ring, and each step is one call "
         "of exchange.",
         "sends to its right neighbour alone": _TO_THE_RIGHT,
         "bytes sent": "(N-1)/N of the buffer: one slice in each of N - 1 rounds."}),
    "1.3": Exercise(
        "a function (flat, rank, world_size, exchange) → this rank's slice of the sum, in rank "
        "order",
        _observe_sum_in_rank_order, sum_in_rank_order, [
            Mistake(ring_reduce_scatter, "That is the ring, which adds up each slice in a "
                    "different order. Receive everybody's part of your slice first, then add, from "
                    "rank 0 on."),
            Mistake(_own_first, "You begin with your own part, so every rank adds in a different "
                    "order. Begin with rank 0's, and take your own when its turn comes."),
            Mistake(_whole_buffers, "The sum is right, but everyone sends its whole buffer to "
                    "everyone. Rank r needs only slice r of it."),
            Mistake(_own_slice_to_all, "You send your slice `rank` to everyone. Rank r adds up "
                    "slice r: send it your slice r."),
            Mistake(_whole_buffers_to_slices, "Rank r needs slice r of your buffer, and has made "
                    "room for that alone.", "has made room for"),
            Mistake(_without_own_part, "Your own part is not sent to anybody, so it does not "
                    "arrive with the others: put it among them yourself.", "KeyError"),
            Mistake(_rounded_from_float64, _FLOAT64),
            Mistake(_in_float64, _FLOAT64),
            Mistake(_own_part_twice, _TWICE),
            Mistake(_own_part_first_and_in_its_turn, _TWICE),
            Mistake(_without_its_own, "Your own part of the slice is missing from the sum."),
        ],
        {"the result": "Add from left to right: rank 0's part, then rank 1's, and so on.",
         "rounds": "One round is enough: everyone sends to everyone at once.",
         "bytes sent": "Each of the N - 1 other ranks gets one slice, (N-1)/N of the buffer.",
         "flat is as it was": "Add up in memory of its own: `flat` is the caller's."}),
}
