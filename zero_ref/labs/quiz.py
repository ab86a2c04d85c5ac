"""Five questions for each notebook, and what to say about each answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """text: what is asked. options: {letter: what it says}. right: its letter. remarks: for each
    wrong letter, what is wrong with it, without giving the right letter away."""

    text: str
    options: dict[str, str]
    right: str
    remarks: dict[str, str]


QUESTIONS: dict[str, Question] = {
    # ---- 0. Where the memory goes ----------------------------------------------------------------
    "0.q1": Question(
        "Plain data parallelism with Adam runs on 8 ranks. You start it on 16 instead, and every "
        "rank keeps its batch size. What happens to the model states on one rank?",
        {"a": "They halve, because twice as many ranks share them.",
         "b": "They stay as large as they were.",
         "c": "The gradients halve, because each rank has a smaller part in the mean.",
         "d": "They grow, because there are more ranks whose gradients have to be kept."},
        "b",
        {"a": "In plain data parallelism nothing is divided among the ranks: each of them can run "
              "and update the whole model by itself.",
         "c": "A gradient has one element for each parameter, however many ranks take part in the "
              "mean.",
         "d": "What arrives from other ranks is added up, not kept for each sender."}),
    "0.q2": Question(
        "A net is trained in the paper's mixed precision, but with SGD with momentum in place of "
        "Adam. How many bytes of model states does one parameter take, without sharding?",
        {"a": "6", "b": "8", "c": "12", "d": "16"},
        "c",
        {"a": "This counts everything in 16 bits. An optimizer that updates 16-bit numbers loses "
              "its small updates.",
         "b": "Momentum needs one value per parameter, but the optimizer keeps something else in "
              "32 bits, too: what does it add the update to?",
         "d": "That is the sum for Adam, which keeps two running averages. How many does momentum "
              "keep?"}),
    "0.q3": Question(
        "Each rank has room for 3 bytes of model states per parameter, in mixed precision with "
        "Adam. You may use as many ranks as you like. Which is the lowest stage that fits?",
        {"a": "Stage 1", "b": "Stage 2", "c": "Stage 3",
         "d": "None: a parameter takes 16 bytes at every stage."},
        "b",
        {"a": "Stage 1 divides only the 12 bytes of the optimizer states. What do parameters and "
              "gradients add up to?",
         "c": "Stage 3 does fit. But what does a lower stage approach as the number of ranks "
              "grows?",
         "d": "All ranks together always keep at least 16 bytes per parameter, but the question is "
              "what one of them keeps."}),
    "0.q4": Question(
        "You double the batch of every rank and change nothing else. Which of these take more "
        "memory: the parameters, their gradients, the optimizer states, the saved activations?",
        {"a": "All four of them.",
         "b": "The gradients and the activations, since both are computed from the samples.",
         "c": "The optimizer states and the activations, since Adam averages over the samples.",
         "d": "The activations alone."},
        "d",
        {"a": "Parameters belong to the model: they exist before any sample is seen.",
         "b": "The gradients of all samples are added up while they are computed, into one element "
              "per parameter.",
         "c": "Adam averages over steps. It keeps the same number of values per parameter whatever "
              "the batch is."}),
    "0.q5": Question(
        "With 16-bit parameters, a model just fits into the memory of a GPU for inference. How "
        "large is the largest model that this GPU alone can train in mixed precision with Adam, "
        "activations aside?",
        {"a": "An eighth of that size.",
         "b": "A quarter of that size.",
         "c": "Half that size.",
         "d": "Just that size."},
        "a",
        {"b": "This counts 8 bytes per parameter, as if gradients and Adam's averages had 16 bits "
              "too. Which of them have more, and what else is kept?",
         "c": "This counts parameters and gradients. Training keeps more than those.",
         "d": "Inference keeps neither gradients nor anything that belongs to the optimizer."}),

    # ---- 1. Ranks and collectives ----------------------------------------------------------------
    "1.q1": Question(
        "A buffer is all-reduced, by a reduce_scatter and an all_gather, on 8 ranks and then on "
        "64. How does the number of bytes change that each rank has to send?",
        {"a": "It falls to an eighth of what it was.",
         "b": "It stays exactly what it was.",
         "c": "It grows by an eighth of what it was.",
         "d": "It grows to eight times what it was."},
        "c",
        {"a": "The slices become smaller, but each rank has to send more of them.",
         "b": "Nearly. But there is one slice that a rank need not send, and with more ranks this "
              "slice is a smaller part of the buffer.",
         "d": "This would be right if every rank sent the whole buffer to every other. How much of "
              "the buffer does one rank send to one other?"}),
    "1.q2": Question(
        "Ranks 0, 1 and 2 hold [1, 2, 3], [10, 20, 30] and [100, 200, 300]. What does rank 1 "
        "get from a reduce_scatter that takes the sum?",
        {"a": "[222]", "b": "[60]", "c": "[111]", "d": "[111, 222, 333]"},
        "a",
        {"b": "This is the sum of rank 1's own elements. A reduction adds what different ranks "
              "hold in the same place.",
         "c": "The sum is right, but it is another rank's slice: slices are counted from 0, as "
              "ranks are.",
         "d": "This is what an all_reduce leaves on every rank. A reduce_scatter is only its first "
              "half."}),
    "1.q3": Question(
        "Four ranks sum their gradients in every step, by torch's own collectives. Rank 3's data "
        "have one batch fewer, so it leaves the loop a step early; its process lives on and calls "
        "no collective any more. What happens in the last step of the others?",
        {"a": "They get the mean over the three ranks that are left.",
         "b": "They get the mean over four ranks, in which rank 3 counts as zero.",
         "c": "They are told at once that rank 3 has left, by an error in backward.",
         "d": "They wait for rank 3 in their first collective, until a timeout ends it."},
        "d",
        {"a": "A collective takes all ranks of its group. Nothing tells the others to go on "
              "without one of them.",
         "b": "Some rank would have to send the zeros, and rank 3 sends nothing.",
         "c": "A silent rank looks just like a slow one. How could the others tell the "
              "difference?"}),
    "1.q4": Question(
        "Four ranks sum a buffer of floating-point gradients, first around a ring and then in rank "
        "order. Which change can alter the last bits of an element's sum in the ring, but not in "
        "rank order?",
        {"a": "A fifth rank takes part, with gradients of its own.",
         "b": "The buffer is cut elsewhere, so that the element lies in another slice.",
         "c": "Ranks 1 and 2 exchange their gradients before the sum begins.",
         "d": "All gradients are rounded to 16 bits before they are added."},
        "b",
        {"a": "That adds one more number, which changes the sum in either order.",
         "c": "This changes the sequence of the numbers in rank order as well.",
         "d": "Then different numbers are added, whatever the order."}),
    "1.q5": Question(
        "Eight ranks all-gather a buffer so small that a message takes the same time whatever its "
        "size. A rank's messages may be on their way at the same time. Which is faster, a ring or "
        "direct exchange?",
        {"a": "Direct exchange, because a rank sends fewer bytes.",
         "b": "The ring, because a rank talks to one neighbour only.",
         "c": "Direct exchange, because no message waits for another.",
         "d": "Neither, because a rank sends the same bytes in both."},
        "c",
        {"a": "Count the slices that a rank sends: there are equally many in both.",
         "b": "That saves connections. But can a rank pass on a slice that it has not received "
              "yet?",
         "d": "The bytes are the same. But here they are not what takes the time."}),

    # ---- 2. Stage 0: data parallelism from hooks -------------------------------------------------
    "2.q1": Question(
        "The gradients are summed over 4 ranks and not divided. The optimizer is plain SGD, "
        "without momentum, weight decay or clipping. Which learning rate leads to the weights that "
        "the learning rate lr gives with the mean?",
        {"a": "lr/4", "b": "lr/2", "c": "lr", "d": "4·lr"},
        "a",
        {"b": "The square root of the number of ranks comes from arguments about the noise of "
              "larger batches. Compare the two gradients themselves.",
         "c": "SGD multiplies the gradient as it is. Adam is the one that hides its size.",
         "d": "That makes the step even larger. Which of the two gradients is larger?"}),
    "2.q2": Question(
        "Rank 0 has 24 images and rank 1 has 8. Each takes the mean loss over its own images, and "
        "the gradients are averaged over the two ranks. How much does an image of rank 1 count in "
        "the result, compared with one of rank 0?",
        {"a": "A third as much.", "b": "As much.", "c": "Three times as much."},
        "c",
        {"a": "Rank 0 has more images. But both ranks have the same share in the average: among "
              "how many images does each rank divide it?",
         "b": "A mean of means is the mean over all images if the batches are equally large, and "
              "here they are not."}),
    "2.q3": Question(
        "Six units follow one another at stage 0, with overlap and a message for each unit. For "
        "which message is there no backward computation left behind which it could hide?",
        {"a": "For that of unit 6, which is nearest to the loss.",
         "b": "For that of unit 1, which is nearest to the input.",
         "c": "For none, because each starts as soon as its gradients are there.",
         "d": "For all of them, because the optimizer needs all gradients."},
        "b",
        {"a": "Think of the order in which backward goes through the units: what does it still "
              "have to compute when this message starts?",
         "c": "Each does start as early as it can. But what does autograd still have to compute "
              "when the last of them starts?",
         "d": "The optimizer does wait for all messages, but until it does, backward goes on."}),
    "2.q4": Question(
        "You leave out the broadcast, so that every rank starts from different random weights. The "
        "gradients are averaged in every step, and the optimizer is plain SGD without weight "
        "decay. What becomes of the differences between the ranks' weights?",
        {"a": "They shrink from step to step, because the ranks are averaged.",
         "b": "They are gone after one step, because all ranks get the same gradient.",
         "c": "They grow from step to step, because each rank follows its own gradient.",
         "d": "They stay what they were, except for rounding."},
        "d",
        {"a": "Only the gradients are averaged. Nothing averages the weights.",
         "b": "The same gradient is subtracted on all ranks, but from different weights.",
         "c": "After the average there is one gradient, and all ranks follow it."}),
    "2.q5": Question(
        "By mistake all 4 ranks read the same 8 images in every step of stage 0. Which step do "
        "they take?",
        {"a": "The one that a single rank would take on these 8 images.",
         "b": "The one that a single rank would take on 32 different images.",
         "c": "One that is four times as long as a single rank's.",
         "d": "None: gradients that are equal on all ranks are refused."},
        "a",
        {"b": "The ranks together have seen 8 different images, and only these can have shaped the "
              "gradient.",
         "c": "Four equal gradients are added up, but stage 0 does one more thing with the sum.",
         "d": "Nothing compares the ranks' gradients, or their data. This mistake is silent."}),

    # ---- 3. The flat buffer ----------------------------------------------------------------------
    "3.q1": Question(
        "A unit in fp32 has a weight of 30 elements and then a bias of 10. Parameters and slices "
        "begin at multiples of 4 elements, and the slices are no longer than necessary. Which of 4 "
        "ranks update the bias at stage 1?",
        {"a": "Rank 2 alone.",
         "b": "Ranks 2 and 3, a part each.",
         "c": "Rank 3 alone.",
         "d": "All four, a part each."},
        "b",
        {"a": "The bias begins in rank 2's slice. Does it also end there?",
         "c": "The bias ends in rank 3's slice. Does it also begin there?",
         "d": "The flat buffer is cut into four, and not each of its parameters."}),
    "3.q2": Question(
        "Which optimizer would arrive at other weights if each rank gave it only the slice of a "
        "parameter that the rank owns?",
        {"a": "SGD with momentum, because it remembers earlier gradients.",
         "b": "AdamW, because it makes the weights smaller in every step.",
         "c": "LARS, because it scales a layer's step by the norm of the layer.",
         "d": "RMSprop, because it divides by a running average."},
        "c",
        {"a": "An element's momentum comes from the earlier gradients of that element alone.",
         "b": "Weight decay shrinks each element by a share of itself, whoever holds the others.",
         "d": "The average is taken over steps, for each element by itself, and not over the "
              "elements."}),
    "3.q3": Question(
        "An embedding and the head share one weight of V·d elements. How many elements of "
        "`exp_avg` do 4 ranks keep for it at stage 1, all together?",
        {"a": "V·d/4", "b": "V·d", "c": "2·V·d", "d": "4·V·d"},
        "b",
        {"a": "That is about what a single rank keeps.",
         "c": "The module shows it in two places, but it is one tensor, whose gradient is the sum "
              "over both uses.",
         "d": "That is the case at stage 0, where every rank keeps states for every element."}),
    "3.q4": Question(
        "A model's only unit has 8 elements in fp32, so on 4 ranks the slices of ranks 2 and 3 are "
        "empty. At zero_ref's stage 1 these two leave out `optimizer.step()`. What happens?",
        {"a": "The all_gather that belongs to the step lacks two ranks, and the run breaks down.",
         "b": "Nothing changes: these ranks have no element to update.",
         "c": "The run goes on, but ranks 2 and 3 compute with old weights."},
        "a",
        {"b": "They have nothing to update. But at stage 1 something else belongs to a step, and "
              "every rank is needed for that.",
         "c": "They would have old weights. But what happens to ranks 0 and 1, which do take the "
              "step?"}),
    "3.q5": Question(
        "An embedding has half of all parameters. Instead of cutting a flat buffer, you deal out "
        "whole parameters to 8 ranks, as evenly as possible. What share of the optimizer states "
        "does the fullest rank keep?",
        {"a": "An eighth", "b": "A quarter", "c": "A half", "d": "All of them"},
        "c",
        {"a": "That is the average over the ranks, and what equal slices give. Can whole "
              "parameters be dealt out so evenly here?",
         "b": "For that, two ranks would have to share the embedding.",
         "d": "The parameters other than the embedding can go to the seven other ranks."}),

    # ---- 4. Stage 1: who updates what ------------------------------------------------------------
    "4.q1": Question(
        "You leave out the all_gather after the step of stage 1, on 4 ranks. What is wrong in rank "
        "0's next forward?",
        {"a": "Three quarters of its parameters are those from before the step.",
         "b": "One quarter of its parameters, its own slice, is from before the step.",
         "c": "Its optimizer states are older than those on the other ranks.",
         "d": "Nothing, as the reduce_scatter has brought what the others computed."},
        "a",
        {"b": "Its own slice is what rank 0's optimizer has just updated.",
         "c": "Every rank's optimizer has taken the step for its own slice. And forward uses no "
              "optimizer states.",
         "d": "The reduce_scatter came before the step. What did the others compute after it?"}),
    "4.q2": Question(
        "A colleague's stage 1 ends with the right bits, but in every step each rank sends "
        "3Ψ·(N-1)/N elements and not 2Ψ·(N-1)/N. What explains that?",
        {"a": "The parameters are gathered in a message per unit, and not all in one.",
         "b": "Both averages of Adam are gathered after the step, as the parameters are.",
         "c": "The gradients are all-reduced, where a reduce_scatter would do.",
         "d": "The gradients are divided by N before they are summed, and not after."},
        "c",
        {"a": "That makes more messages. How many elements have they all together?",
         "b": "Nobody needs the others' averages; and two more gathers would make it "
              "4Ψ·(N-1)/N.",
         "d": "Each rank divides what it holds, so nothing is sent for that."}),
    "4.q3": Question(
        "Stage 1 with Adam in fp32 goes from 4 ranks to 8. How much memory of model states does "
        "every rank save, for each parameter of the model?",
        {"a": "1 byte", "b": "2 bytes", "c": "4 bytes", "d": "5 bytes"},
        "a",
        {"b": "On 4 ranks, 2 bytes per parameter are a rank's share of Adam's averages. How many "
              "are left on 8?",
         "c": "That is what going from one rank to two would save.",
         "d": "That would be half of everything. Which part of it does stage 1 divide by the "
              "number of ranks?"}),
    "4.q4": Question(
        "On each of 4 ranks at stage 1 you compute `sum(p.numel() for p in model.parameters())`, "
        "and add up the four results. All Ψ parameters of the module are trainable. What do you "
        "get?",
        {"a": "Ψ/4", "b": "Ψ", "c": "Ψ and the padding", "d": "4Ψ"},
        "b",
        {"a": "That is about what you see on one rank.",
         "c": "There may be padding in the flat buffers, but what the optimizer sees are parts of "
              "parameters.",
         "d": "That is so at stage 0, where every rank updates everything."}),
    "4.q5": Question(
        "After a backward at zero_ref's stage 1, rank 2 looks into its full gradient buffer, at "
        "slice 0. What does it find there?",
        {"a": "The mean of all ranks' gradients.",
         "b": "The sum of all ranks' gradients, not yet divided.",
         "c": "Nothing, because this part has been freed.",
         "d": "The gradient that its own samples gave."},
        "d",
        {"a": "Then rank 2 would have received this slice from the others. Which one has it "
              "received?",
         "b": "Where a sum is taken, it is divided at once. But who has taken the sum of this "
              "slice?",
         "c": "Stage 1 keeps the whole buffer. A later stage frees it."}),

    # ---- 5. Stage 2: freeing gradients -----------------------------------------------------------
    "5.q1": Question(
        "A net has 12 equal units with u bytes of gradients each. Stage 2 runs on 4 ranks, without "
        "overlap and with a message per unit; the slices of all units keep their memory from step "
        "to step. How many bytes do the gradients take at the peak of a later backward?",
        {"a": "3u", "b": "4u", "c": "12u", "d": "15u"},
        "b",
        {"a": "These are the slices of all units. Where does backward put the gradients of the "
              "unit that it is working on?",
         "c": "That is stage 1, where all full gradients are kept.",
         "d": "That would be so if no full gradient were freed before the end of backward."}),
    "5.q2": Question(
        "An embedding, a unit of its own and used first in forward, has 90 % of a net's Ψ "
        "parameters. Stage 2 runs on 4 ranks, without overlap and with a message per unit. How "
        "many elements do the gradients take at the peak of a backward?",
        {"a": "0.25Ψ", "b": "0.9Ψ", "c": "Ψ", "d": "1.15Ψ"},
        "d",
        {"a": "That is what is left when backward has ended.",
         "b": "That is the embedding's full gradient. What else does the rank hold while it is "
              "being reduced?",
         "c": "That is stage 1. Add up what is held at stage 2 while the embedding's gradient is "
              "being reduced."}),
    "5.q3": Question(
        "Stage 2 accumulates 8 micro-batches. How many times as many bytes does a rank send per "
        "step if every backward reduces, as it does with `no_sync()` around all but the last?",
        {"a": "As many", "b": "4.5 times", "c": "8 times", "d": "9 times"},
        "b",
        {"a": "Without `no_sync()` there is a reduce_scatter for every micro-batch.",
         "c": "There are 8 times as many reduce_scatters. But they are not all that is sent in a "
              "step.",
         "d": "9Ψ·(N-1)/N elements are sent if every backward reduces. How many are sent with "
              "`no_sync()`?"}),
    "5.q4": Question(
        "Why may stage 2 free the full gradient of unit 6, as soon as it is reduced, before the "
        "backward of unit 5 has run?",
        {"a": "Because the optimizer has already updated the parameters of unit 6 by then.",
         "b": "Because it can be gathered from the other ranks before the optimizer's step.",
         "c": "Because only the optimizer needs the gradient of a parameter, and just a slice.",
         "d": "Because unit 5, by the chain rule, has already used it for its own gradient."},
        "c",
        {"a": "The optimizer's step comes after the whole backward.",
         "b": "Look at what is sent between backward and step: nobody gathers a gradient.",
         "d": "The chain rule passes on the gradient of a unit's input, not that of its weights."}),
    "5.q5": Question(
        "One version of stage 2 reduces each of 12 units in a message of its own during backward, "
        "another reduces all units in one message at the end. What is different?",
        {"a": "The first sends more bytes, because it sends twelve messages.",
         "b": "The first sends fewer bytes, because it sends slices only.",
         "c": "The mean, because the first divides twelve times.",
         "d": "The peak of the gradients' memory, and not the bytes sent."},
        "d",
        {"a": "A message of the first version holds one unit only. Add up all twelve.",
         "b": "In both versions a rank sends all slices of every unit, except its own.",
         "c": "In both versions each element is divided once."}),

    # ---- 6. Stage 3: gather, compute, free -------------------------------------------------------
    "6.q1": Question(
        "After some steps of training you run one batch of validation under `torch.no_grad()`. How "
        "many elements does each rank send for it?",
        {"a": "None at stage 1, and none at stage 3.",
         "b": "None at stage 1, and Ψ·(N-1)/N at stage 3.",
         "c": "Ψ·(N-1)/N at stage 1, and as many at stage 3.",
         "d": "2Ψ·(N-1)/N at stage 1, and 3Ψ·(N-1)/N at stage 3."},
        "b",
        {"a": "There is indeed no backward. But which parameters does a rank hold when a forward "
              "begins at stage 3?",
         "c": "Stage 1 gathers its parameters after the optimizer's step, and here there is none.",
         "d": "That is what a step of training costs. Which of its collectives belong to "
              "forward?"}),
    "6.q2": Question(
        "The largest unit of a net has 40 % of the Ψ parameters. Stage 3 runs on more and more "
        "ranks, without overlap. Which number of elements does the peak of a rank's parameters "
        "approach?",
        {"a": "Ψ", "b": "0.6Ψ", "c": "0.4Ψ", "d": "0"},
        "c",
        {"a": "That would be so if no unit were freed before the last one is gathered.",
         "b": "These are the other units. Are they held in full while the largest one computes?",
         "d": "That is what the slices alone approach. But a unit does not compute with its "
              "slice."}),
    "6.q3": Question(
        "Somebody frees the parameters `p` of a unit in the middle of a net after its forward, by "
        "`p.data = torch.empty(0)`. Under `no_grad()` the memory is given back, in training it is "
        "not. Who holds it in training?",
        {"a": "Autograd, in what it has saved for backward.",
         "b": "The optimizer, in its list of parameters.",
         "c": "The gradient, which shares the parameter's memory.",
         "d": "The process group, for the next all_gather."},
        "a",
        {"b": "The optimizer's list holds `p` itself, and so only what `p.data` is now.",
         "c": "A gradient has its own memory, which holds no parameter.",
         "d": "A process group does not know whether gradients are computed, so it would hold the "
              "memory under `no_grad()`, too."}),
    "6.q4": Question(
        "At stage 3, `model.named_parameters()` lists '6.1.bias' with 0 elements on rank 2. What "
        "does that mean?",
        {"a": "Its values were lost when the module was wrapped.",
         "b": "It is frozen, so that no optimizer may change it.",
         "c": "It is resharded, and shows its 16 elements during a forward.",
         "d": "No part of it lies in rank 2's slice of unit 6."},
        "d",
        {"a": "`model.state_dict()` has them all. Other ranks hold what rank 2 does not.",
         "b": "A frozen parameter is not in this list at all, on any rank.",
         "c": "The list has what this rank's optimizer updates, which is the same before, during "
              "and after a forward."}),
    "6.q5": Question(
        "A branch in forward lets rank 1 skip a unit in this step, which all other ranks run. The "
        "stages 0 to 2 cope with that. Why does stage 3 not?",
        {"a": "Rank 1's gradient of the unit would count as zero in the mean.",
         "b": "The other ranks need rank 1's slice of the unit's parameters.",
         "c": "The other ranks need the unit's activations of rank 1.",
         "d": "Rank 1 could not update its slice of the unit any more."},
        "b",
        {"a": "It counts as zero at the other stages, too, and they cope.",
         "c": "At no stage does a rank use the activations of another.",
         "d": "From stage 1 on, a rank updates its slice with the mean gradient, to which the "
              "others contribute."}),

    # ---- 7. Real training ------------------------------------------------------------------------
    "7.q1": Question(
        "On four ranks the slices of the gradient have the Euclidean norms 3, 4, 0 and 0, and the "
        "gradient is to be clipped to norm 1. By what does rank 0 have to multiply its slice?",
        {"a": "1/3", "b": "1/4", "c": "1/5", "d": "1/7"},
        "c",
        {"a": "This clips rank 0's slice by itself. If every rank did so, the gradient would point "
              "elsewhere.",
         "b": "Taking the largest norm of a slice is right for the maximum norm, but this is the "
              "Euclidean one.",
         "d": "The norm of two slices put end to end is not the sum of their norms."}),
    "7.q2": Question(
        "The paper's mixed precision keeps 2 + 2 + 12 bytes per parameter, Adam in fp32 4 + 4 + 8. "
        "On 8 ranks, at which stages does a rank keep fewer bytes with mixed precision?",
        {"a": "At stages 1 and 2", "b": "At every stage", "c": "At no stage", "d": "At stage 3"},
        "a",
        {"b": "Begin with stage 0, and add up both.",
         "c": "The two sums are equal. But not every stage divides all three terms by 8.",
         "d": "Stage 3 divides all three terms by 8. What is left of the difference?"}),
    "7.q3": Question(
        "Stage 3 accumulates several micro-batches, all but the last inside `no_sync()`. Of its "
        "all_gather in forward, its all_gather in backward and its reduce_scatter, which does a "
        "micro-batch inside `no_sync()` do without?",
        {"a": "All three, because nothing is sent inside `no_sync()`.",
         "b": "Both all_gathers, because the parameters have not changed.",
         "c": "The all_gather in backward, because forward has just gathered.",
         "d": "The reduce_scatter, because the gradients are kept."},
        "d",
        {"a": "Then what would this micro-batch compute with?",
         "b": "They have not changed, but they have been freed: a unit is resharded after each use "
              "inside `no_sync()`, too.",
         "c": "What does stage 3 do with a unit's parameters when its forward is over?"}),
    "7.q4": Question(
        "In a training step a BatchNorm layer gets 8 images on each of 4 ranks. With which mean "
        "does it normalize on rank 2?",
        {"a": "That of all 32 images.",
         "b": "That of rank 2's 8 images.",
         "c": "That of rank 0's 8 images.",
         "d": "The running mean that rank 0 has broadcast."},
        "b",
        {"a": "For that the ranks would have to talk to one another inside the layer, as "
              "SyncBatchNorm's do.",
         "c": "The mean of rank 0's batch is not sent to anybody in this forward.",
         "d": "It is broadcast before forward. But in which mode does BatchNorm normalize with "
              "it?"}),
    "7.q5": Question(
        "At stage 1 on 4 ranks you save `model.state_dict()` and rank 0's "
        "`optimizer.state_dict()`, as one does with DDP. What is missing when you resume?",
        {"a": "Three quarters of Adam's averages.",
         "b": "Nothing, as all optimizers hold the same.",
         "c": "Adam's count of steps on the other ranks.",
         "d": "Three quarters of the weights."},
        "a",
        {"b": "That is so with DDP and at stage 0. What does a rank's optimizer see at stage 1?",
         "c": "All ranks have taken the same number of steps, so rank 0's count serves them all.",
         "d": "`model.state_dict()` has all weights in full, on every rank."}),

    # ---- 8. Overlap: what bounds a step ----------------------------------------------------------
    "8.q1": Question(
        "A net has 12 equal units with p bytes of parameters each. At stage 3 on 4 ranks, the peak "
        "of the parameters is 4p without overlap. What is it with overlap, when one unit is "
        "gathered ahead?",
        {"a": "4p", "b": "5p", "c": "6p", "d": "8p"},
        "b",
        {"a": "The unit that is gathered ahead needs its memory before the other one is freed.",
         "c": "How many units are held in full without overlap, and how many are gathered ahead?",
         "d": "The slices do not double. Take them away from 4p before you add anything."}),
    "8.q2": Question(
        "Think of ideal overlap: forward computes for f and backward for 2f, to send all "
        "parameters once takes m, each pass lasts as long as the longer of computing and sending, "
        "and the optimizer takes no time. If m = 3f, how long is a step of stage 3, compared with "
        "one of stage 0?",
        {"a": "3 times as long",
         "b": "3/2 times as long",
         "c": "9/7 times as long",
         "d": "Just as long"},
        "c",
        {"a": "That is what happens to forward alone. Add backward, in which both stages send.",
         "b": "That is the ratio of bytes. Stage 0 sends nothing in forward, but it has to compute "
              "in it.",
         "d": "That holds while all messages hide behind the computation. Do they, if m = 3f?"}),
    "8.q3": Question(
        "At stage 3 the messages take longer than the computation behind which they could hide. "
        "Which change lets a larger part of them hide? (Leave the first and the last unit aside.)",
        {"a": "More layers of the same kind, so that there is more to compute.",
         "b": "More ranks, each with the same batch as now.",
         "c": "More micro-batches of the same size in each step.",
         "d": "More samples in the batch of every rank."},
        "d",
        {"a": "More layers also have more parameters, which have to be sent.",
         "b": "Each rank then computes as much as before and sends (N-1)/N of the same Ψ, which "
              "grows with N.",
         "c": "Stage 3 gathers and reduces anew for every micro-batch."}),
    "8.q4": Question(
        "In a timeline the same reduce_scatter lasts 8 ms on rank 0 and 1 ms on rank 1. "
        "What is the likeliest reason?",
        {"a": "Rank 1 came to it 7 ms later than rank 0.",
         "b": "Rank 0 has to send eight times as many bytes.",
         "c": "Rank 0 adds up the slices of both ranks.",
         "d": "The network is slow, and a faster one would save 7 ms."},
        "a",
        {"b": "In a reduce_scatter all ranks send the same number of bytes.",
         "c": "Each rank adds up its own slice, and all slices are equally long.",
         "d": "A slow network makes it slow for both ranks: neither can do without the other's "
              "part."}),
    "8.q5": Question(
        "On 2 ranks, with overlap, a step of stage 1 takes just as long as one of stage 0. On 4 "
        "ranks it takes the same time as before to compute a unit, to send a message and to update "
        "all parameters. Which stage is faster there?",
        {"a": "Stage 0, because fewer of its messages are not hidden.",
         "b": "Neither of them, because they send equally many bytes.",
         "c": "Neither of them, because a message takes as long as before.",
         "d": "Stage 1, because a rank updates a smaller part."},
        "d",
        {"a": "That is so on 2 ranks as well, where both take equally long. What has changed?",
         "b": "That is also true on 2 ranks. Bytes alone do not decide how long a step takes.",
         "c": "Messages are one part of a step. Is there another one that depends on the number of "
              "ranks, and at which stage?"}),

    # ---- 9. Compare ------------------------------------------------------------------------------
    "9.q1": Question(
        "FSDP2 with `reshard_after_forward=False` for every unit is often called ZeRO-2. What does "
        "a rank keep of the parameters between two steps, and how much does it send per step?",
        {"a": "All of them, and it sends 2Ψ·(N-1)/N.",
         "b": "Its shard, and it sends 2Ψ·(N-1)/N.",
         "c": "All of them, and it sends 3Ψ·(N-1)/N.",
         "d": "Its shard, and it sends 3Ψ·(N-1)/N."},
        "b",
        {"a": "That is ZeRO-2 itself. What does FSDP2 do with the parameters when backward is "
              "over?",
         "c": "A rank that keeps all parameters between two steps has nothing to gather in "
              "forward.",
         "d": "For the third Ψ, backward would have to gather again what forward has gathered."}),
    "9.q2": Question(
        "On each rank of a job 2 GB are model states and 30 GB activations, at stage 0. You change "
        "to stage 3, on 8 ranks. What happens to these 32 GB?",
        {"a": "About 4 GB", "b": "About 6 GB", "c": "About 30 GB", "d": "32 GB, as before"},
        "c",
        {"a": "This divides everything by 8. Which part of the 32 GB do the stages divide?",
         "b": "This divides the activations by 8. But each rank still has all of its own samples.",
         "d": "The model states do become smaller. How much are 2 GB, divided by 8?"}),
    "9.q3": Question(
        "In the recording of a forward you find an all_reduce of a tensor of the shape (batch, "
        "features). Which of these sends it?",
        {"a": "DDP", "b": "ZeRO stage 2", "c": "ZeRO stage 3", "d": "Tensor parallelism"},
        "d",
        {"a": "DDP all-reduces the gradients of parameters, whose shapes do not depend on the "
              "batch, and does so in backward.",
         "b": "Stage 2 sends gradients of parameters in backward, and parameters after the step.",
         "c": "Stage 3 does send in forward. But what it sends has the size of a unit, whatever "
              "the batch is."}),
    "9.q4": Question(
        "FSDP2 cuts a weight of 9 rows along its first dimension, for 4 ranks. How many rows do "
        "ranks 0 to 3 have at rest?",
        {"a": "3, 3, 3 and 0",
         "b": "3, 2, 2 and 2",
         "c": "2¼ each",
         "d": "9, 0, 0 and 0"},
        "a",
        {"b": "That would be the most even way. But the pieces are to have one size for as long as "
              "there are rows: what size is that?",
         "c": "A flat buffer may be cut inside a row. FSDP2 keeps rows whole.",
         "d": "Dealing out whole parameters is what ZeroRedundancyOptimizer does."}),
    "9.q5": Question(
        "A net has 12 layers, and each of 4 ranks has 8 images of its own. What does rank 2 "
        "compute in a forward at stage 3?",
        {"a": "Layers 7 to 9, for all 32 images.",
         "b": "A quarter of each layer, for all 32 images.",
         "c": "All 12 layers, for its own 8 images.",
         "d": "Layers 7 to 9, for its own 8 images."},
        "c",
        {"a": "This is a pipeline, in which a rank hands on its activations to the next one.",
         "b": "This is tensor parallelism, in which the ranks share each product.",
         "d": "Then who would compute the other layers for these 8 images?"}),

    # ---- 10. On real hardware --------------------------------------------------------------------
    "10.q1": Question(
        "torchrun starts 4 ranks on each of 3 machines, and each machine has 4 GPUs. Which device "
        "is the process with RANK=9 to use?",
        {"a": "cuda:0", "b": "cuda:1", "c": "cuda:2", "d": "cuda:9"},
        "b",
        {"a": "Ranks are counted machine by machine. They are not dealt out in turn.",
         "c": "2 is the number of its machine, counted from 0.",
         "d": "RANK counts the processes of all machines, but every machine counts its own GPUs "
              "from 0."}),
    "10.q2": Question(
        "After a step, `torch.cuda.memory_allocated()` is 3 GB, as the formula says. For the same "
        "process nvidia-smi shows 20 GB. What are most of the other 17 GB?",
        {"a": "Tensors that should have been freed and were not.",
         "b": "Optimizer states, which torch does not count.",
         "c": "Parameters of the other ranks, gathered for the next step.",
         "d": "Blocks that torch's allocator keeps for later use."},
        "d",
        {"a": "A tensor that has not been freed is allocated, so it would be among the 3 GB.",
         "b": "Optimizer states are tensors like any others, so they are among the 3 GB.",
         "c": "If they were there, they would be tensors, and among the 3 GB."}),
    "10.q3": Question(
        "`if rank == 0: torch.save(model.state_dict(), path)` has worked at stage 1 in fp32. At "
        "stage 3 it hangs or fails. Which change fixes it?",
        {"a": "A `barrier()` before the `if`, so that all ranks have arrived.",
         "b": "A longer timeout, because gathering all parameters takes long.",
         "c": "All ranks call `model.state_dict()`; rank 0 saves what it returns.",
         "d": "`overlap=False`, so that nothing is in flight while rank 0 saves."},
        "c",
        {"a": "After the barrier rank 0 is alone again in whatever comes next.",
         "b": "Rank 0 waits for something that the others never send, however long it waits.",
         "d": "No message in flight is in the way: a message that should come does not."}),
    "10.q4": Question(
        "On GPUs with NCCL you note the time, start the all_reduce of 1 GB with `async_op=True`, "
        "call `wait()` on what it returns and note the time again: 0.1 ms. How can that be?",
        {"a": "`wait()` makes the GPU's stream wait, and not your program.",
         "b": "The connections between the GPUs are as fast as that.",
         "c": "The all_reduce was over before you called `wait()`.",
         "d": "`wait()` returns when this rank has sent its own part."},
        "a",
        {"b": "1 GB in 0.1 ms would be 10 TB per second, and no connection between GPUs comes near "
              "that.",
         "c": "It started after you had first noted the time, so it would have taken less than "
              "0.1 ms itself.",
         "d": "The result consists of the others' parts as well, and sending one's own takes its "
              "time, too."}),
    "10.q5": Question(
        "A run at stage 3 with a message per unit hangs. `ZERO_REF_CHECK=1` reports: rank 0 is "
        "about to all_gather unit 1, the net's first layer, in forward; nothing came from rank 3, "
        "which before that went to the reduce_scatter of unit 1 in backward. Where is rank 3, most "
        "likely?",
        {"a": "In the same forward as rank 0, but some units ahead of it.",
         "b": "In backward, before it has the gradients of unit 1.",
         "c": "In the same all_gather as rank 0, but with another size.",
         "d": "Between two steps, for instance at its data loader."},
        "d",
        {"a": "Then the last collective of rank 3 would be an all_gather in forward.",
         "b": "A unit is reduced when it has its gradients, and rank 3 has reached that point for "
              "unit 1.",
         "c": "Then rank 3 would not be missing: the report would show what both of them are about "
              "to do."}),

    # ---- 11. The hunt ----------------------------------------------------------------------------
    "11.q1": Question(
        "A stage 2 ends with the bits of stage 0, sends what the formula says, and holds what the "
        "formula says when the optimizer runs. Still it runs out of memory where stage 2 should "
        "not. What do you look at next?",
        {"a": "The bits after more steps.",
         "b": "The most bytes held at any moment of backward.",
         "c": "The list of collectives of the other ranks.",
         "d": "The bytes of the optimizer states on the other ranks."},
        "b",
        {"a": "A bug in the bits would not need memory.",
         "c": "The others send what this rank sends, as the sums would not be right otherwise.",
         "d": "The other ranks hold what this one does, within the padding."}),
    "11.q2": Question(
        "Gradients are summed over 8 ranks and never divided. Which optimizer hides it longest?",
        {"a": "SGD", "b": "SGD with momentum", "c": "SGD with weight decay", "d": "Adam"},
        "d",
        {"a": "Its update is the gradient times the learning rate, so the update is 8 times as "
              "long.",
         "b": "Momentum adds up gradients. If each is 8 times as long, so is their sum.",
         "c": "The decay does not depend on the gradient, and the rest of the update is 8 times as "
              "long."}),
    "11.q3": Question(
        "A run hangs. Rank 0 waits in an all_gather of the phase state_dict, and the others wait "
        "in an all_gather of the phase forward. Which rank has a line that has to change?",
        {"a": "All of them: they run the same program, in which the two paths part.",
         "b": "Rank 0, which should not gather outside of a step.",
         "c": "The others, which are too early in their next step.",
         "d": "None of them: with a longer timeout they would meet."},
        "a",
        {"b": "Somebody has to save the model, and at stage 3 no rank has all of it.",
         "c": "They are where their program sends them. Being early is nothing to mend: they would "
              "wait.",
         "d": "They wait for different messages, and neither of these is ever sent."}),
    "11.q4": Question(
        "On 4 ranks a stage 1 has the right bits, and on 3 ranks it has wrong ones. Which of these "
        "bugs would behave like this on a unit of 272 parameters?",
        {"a": "A missing division by the number of ranks.",
         "b": "A gather after the step that only some units get.",
         "c": "A slice whose size is rounded down.",
         "d": "A clipping norm that each rank takes of its own slices."},
        "c",
        {"a": "A sum is not the mean on 4 ranks either.",
         "b": "The units that are left out would be old on any number of ranks above one.",
         "d": "On 4 ranks, too, each rank has slices of its own, and a norm of its own."}),
    "11.q5": Question(
        "A colleague checks a new stage by giving all ranks the same batch, and by comparing the "
        "weights with those of one process on this batch. Which bug can this check not see?",
        {"a": "Gradients that are summed and not divided, with SGD.",
         "b": "Gradients that are never reduced.",
         "c": "Shards that are updated and never gathered.",
         "d": "A rank that is never updated."},
        "b",
        {"a": "The sum of equal gradients is larger than each of them, and so the weights differ.",
         "c": "Then every rank has old values of what the others have updated.",
         "d": "The weights of this rank would be those of the beginning."}),
}
