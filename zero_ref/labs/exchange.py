"""Sending and receiving, for the exercises on collectives: one round of messages at a time."""

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine import transport


class Exchange:
    """exchange(send={r: tensor, …}, recv={r: tensor, …}): one round. send[r] goes to rank r, and
    recv[r] is filled with what comes from rank r. All ranks take part in every round.

    Counts what this rank sends: `bytes`, `rounds`, `at_once` (the most messages in a round) and
    `partners` (the ranks it has sent to). Raises RuntimeError on every rank if somebody waits for
    a message that nobody sends, or gets one that it does not wait for.
    """

    def __init__(self) -> None:
        self.bytes, self.rounds, self.at_once = 0, 0, 0
        self.partners: set[int] = set()

    def __call__(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> None:
        send = {r: tensor.contiguous() for r, tensor in send.items()}
        self._agree(send, recv)
        landing = {r: tensor.clone() for r, tensor in recv.items()}  # a slice may be both
        works = [dist.irecv(tensor, r) for r, tensor in landing.items()]
        works += [dist.isend(tensor, r) for r, tensor in send.items()]
        for work in works:
            work.wait()
        for r, tensor in recv.items():
            tensor.copy_(landing[r])
        self.bytes += sum(tensor.nbytes for tensor in send.values())
        self.rounds += 1
        self.at_once = max(self.at_once, len(send))
        self.partners |= send.keys()

    def _agree(self, send, recv):
        def sizes(tensors):
            return {str(r): tensor.numel() for r, tensor in tensors.items()}

        text = json.dumps([sizes(send), sizes(recv)]).encode()
        texts = transport.all_gather_bytes(torch.frombuffer(bytearray(text), dtype=torch.uint8),
                                           dist.group.WORLD)
        plans = [json.loads(text) for text in texts]
        for rank, (sends, waits) in enumerate(plans):
            if str(rank) in sends or str(rank) in waits:
                raise RuntimeError(f"round {self.rounds + 1}: rank {rank} exchanges with itself; "
                                   "what it has already need not travel")
            for other, numel in waits.items():
                there = plans[int(other)][0].get(str(rank))
                if there is None:
                    raise RuntimeError(self._text(f"rank {rank} waits for a message from rank "
                                                  f"{other}, which", plans[int(other)][0]))
                if there != numel:
                    raise RuntimeError(f"round {self.rounds + 1}: rank {rank} has made room for "
                                       f"{numel} elements, and rank {other} sends it {there}")
        for rank, (sends, _) in enumerate(plans):
            for other in sends:
                if str(rank) not in plans[int(other)][1]:
                    raise RuntimeError(f"round {self.rounds + 1}: rank {rank} sends to rank "
                                       f"{other}, which does not wait for a message from it")

    def _text(self, who, sends):
        to = "sends nothing" if not sends else f"sends to rank {', '.join(sends)} only"
        return f"round {self.rounds + 1}: {who} {to}"
