"""Orderings: the lines of a step are given, in disorder, and some of them are wrong ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from .judge import Verdict


@dataclass(frozen=True)
class Ordering:
    """task: what the lines are to do. lines: by letter. needed: what to say when a line is missing.
    wrong: why a line does not belong. before: (first, second, why first comes before second); an
    order that fulfils all of these is right."""

    task: str
    lines: dict[str, str]
    needed: dict[str, str]
    wrong: dict[str, str]
    before: Sequence[tuple[str, str, str]]

    def judge(self, name: str, answer: object) -> Verdict:
        """answer: letters, such as "CAB" or "C A B"."""
        if answer is None:
            return Verdict(False, f"{name}: not yet. Type in the letters of the lines, in order.")
        if not isinstance(answer, str | list | tuple):
            return Verdict(False, f'{name} takes letters, such as "C A B", and got {answer!r}.')
        letters = [letter for letter in "".join(map(str, answer)).upper() if letter.isalnum()]
        if unknown := [letter for letter in letters if letter not in self.lines]:
            return Verdict(False, f"{name}: there is no line {unknown[0]}. The lines are "
                                  f"{', '.join(self.lines)}.")
        if twice := [letter for letter in letters if letters.count(letter) > 1]:
            return Verdict(False, f"{name}: line {twice[0]} is there twice. No line is needed "
                                  "twice.")
        for letter in letters:
            if letter in self.wrong:
                return Verdict(False, f"{name}: line {letter} does not belong. "
                                      f"{self.wrong[letter]}")
        for letter, hint in self.needed.items():
            if letter not in letters:
                return Verdict(False, f"{name}: something is missing. {hint}")
        for first, second, why in self.before:
            if letters.index(first) > letters.index(second):
                return Verdict(False, f"{name}: all lines are there, but not in the right order. "
                                      f"{why}")
        return Verdict(True, f"{name} is right.")


ORDERINGS = {
    "1.p1": Ordering(
        "an all_reduce around a ring, on one rank.",
        {"A": "put what arrives into its place, and pass it on to the right, N - 1 times",
         "B": "send your whole buffer to every other rank",
         "C": "cut the buffer into N slices",
         "D": "add what arrives to your own values of that slice, and pass the sum on, N - 1 times",
         "E": "divide by N what has arrived, in each round"},
        {"C": "What travels around the ring is a part of the buffer.",
         "D": "Some rank must first have the sum of a slice.",
         "A": "In the end every rank needs all slices, and after the sums it has only one."},
        {"B": "That sends N - 1 buffers from each rank instead of 2·(N-1)/N.",
         "E": "Several ranks have added to a slice when it arrives: dividing in each round divides "
         "the first contributions again and again."},
        [("C", "D", "The buffer has to be cut before its slices can be sent around."),
         ("D", "A", "Gathering before the sums are complete sends incomplete sums to everyone.")]),
    "2.p1": Ordering(
        "a step of data parallelism (stage 0).",
        {"A": "loss.backward(); a unit's gradients are all_reduced as soon as they are ready",
         "B": "optimizer.zero_grad()",
         "C": "all_gather the parameters",
         "D": "loss = F.cross_entropy(model(x), y), with this rank's images",
         "E": "optimizer.step(), on all parameters",
         "F": "broadcast rank 0's gradients"},
        {"D": "There is no loss yet.", "A": "There are no gradients yet.",
         "E": "Nobody updates the parameters.",
         "B": "In the next step the new gradients would be added to the old ones."},
        {"C": "Every rank updates every parameter, all in the same way: nothing is missing "
         "anywhere after the step.",
         "F": "Then the images of the other ranks would count for nothing: the optimizer needs the "
         "mean over all ranks."},
        [("D", "A", "Backward needs the loss."), ("A", "E", "The step needs the gradients."),
         ("A", "B", "The gradients would be gone before they were used, or would not exist yet."),
         ("E", "B", "The gradients would be gone before the optimizer has seen them.")]),
    "4.p1": Ordering(
        "a step of stage 1, from backward on.",
        {"A": "all_gather the unit's parameters from everyone's shard",
         "B": "divide the sum by N (or let the collective do it)",
         "C": "all_reduce the unit's gradients",
         "D": "the optimizer updates this rank's shard",
         "E": "reduce_scatter the unit's gradients",
         "F": "all_gather the optimizer states",
         "G": "autograd has computed the unit's gradients"},
        {"G": "Where do the gradients come from?",
         "E": "This rank needs the sum over all ranks, of its own slice.",
         "B": "The optimizer needs the mean, not the sum.", "D": "Nobody updates anything.",
         "A": "Every rank still has the old values of what the others have updated."},
        {"C": "It works, and sends 1.5 times what is needed: everyone would get the whole sum, and "
         "uses a slice of it.",
         "F": "Optimizer states stay where they are: nobody but their owner ever needs them."},
        [("G", "E", "There is nothing to reduce before autograd has computed it."),
         ("E", "B", "The division comes after the sum, so that it is done once."),
         ("B", "D", "The optimizer has to see the mean."),
         ("E", "D", "The optimizer needs the sum of the gradients."),
         ("D", "A", "The shards have to be updated before they are gathered.")]),
    "5.p1": Ordering(
        "stage 2, for one unit in backward.",
        {"A": "free the full buffer of gradients",
         "B": "take your slice as a view of the full buffer",
         "C": "collect the unit's gradients in a full buffer",
         "D": "free the full buffer when backward has ended",
         "E": "allocate memory for your slice",
         "F": "wait until the reduce_scatter is done",
         "G": "start the reduce_scatter into your slice"},
        {"C": "Autograd's gradients have to be somewhere before they can be sent.",
         "E": "Where does the sum arrive?", "G": "Nothing was sent.",
         "F": "How do you know that the buffer is not needed any more?",
         "A": "That needs stage 1's memory: the full buffers of all units would add up."},
        {"B": "A view keeps the whole buffer alive, which needs stage 1's memory.",
         "D": "By then the full buffers of all units exist at once, as at stage 1."},
        [("C", "G", "There is nothing to send before the gradients exist."),
         ("E", "G", "The sum needs a place to arrive at."),
         ("G", "F", "Wait for what you have started."),
         ("F", "A", "The buffer is freed while it is still being sent.")]),
    "6.p1": Ordering(
        "stage 3, for one unit in one step, from forward on.",
        {"A": "forward of the unit",
         "B": "gather the unit's parameters, for the second time",
         "C": "gather the unit's parameters",
         "D": "gather the updated parameters of all units",
         "E": "free them, and reduce_scatter the gradients",
         "F": "backward of the unit",
         "G": "free them, so that only the shard remains",
         "H": "the optimizer updates the shard",
         "I": "gather the activations of the other ranks"},
        {"C": "Between steps a rank has only its shard of the parameters.",
         "A": "The unit has to compute something.",
         "G": "If they stayed, all units would be held in full at the end of forward.",
         "B": "Backward needs the parameters, too.", "F": "There are no gradients yet.",
         "E": "The gradients have not been summed, and the parameters are still held in full.",
         "H": "Nobody updates the parameters."},
        {"D": "Every unit is gathered in the next forward anyway.",
         "I": "Each rank has its own images and needs only their activations: this is data "
         "parallelism."},
        [("C", "A", "Forward needs the full parameters."),
         ("A", "G", "They are freed once the unit has computed."),
         ("G", "B", "They are gathered again because they were freed."),
         ("B", "F", "Backward needs the full parameters."),
         ("F", "E", "Gradients exist only after backward."),
         ("E", "H", "The optimizer needs the summed gradients.")]),
    "7.p1": Ordering(
        "clip by the global norm at stage 1, 2 or 3, on one rank.",
        {"A": "take the root",
         "B": "multiply the slices of the gradients by max_norm / norm, if the norm is larger",
         "C": "all_reduce the norms of the ranks",
         "D": "add up the squares of this rank's slices",
         "E": "divide by the number of ranks",
         "F": "all_reduce the sums of squares"},
        {"D": "Begin with what this rank has.", "F": "The other ranks' slices are missing.",
         "A": "A sum of squares is not a norm.", "B": "Nothing has been clipped."},
        {"C": "Norms do not add up. Their squares do.",
         "E": "Each element is on exactly one rank: this is a sum, not a mean."},
        [("D", "F", "There is nothing to sum over the ranks yet."),
         ("F", "A", "The root comes after the sum over all ranks."),
         ("A", "B", "The factor needs the norm.")]),
}
