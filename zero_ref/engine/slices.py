"""What is computed from a slice, and which of it is not what the whole would give.

A norm or a sum of a slice is not that of the whole, and every rank would go on with another number.
So what is computed from a slice is marked by its class as long as it is computed element by
element; anything else is refused, with the way that is right. Which operators work element by
element is known to torch, which tags them `pointwise`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# These keep all elements as they are, or write into them, and are not tagged.
_VIEWS = {"detach", "alias", "lift_fresh", "view", "_unsafe_view", "_reshape_alias", "expand", "t",
          "unsqueeze", "squeeze", "view_as_real", "view_as_complex", "_conj", "_neg_view", "real",
          "imag", "_to_copy", "copy", "cat", "stack", "_local_scalar_dense"}
_WRITES = {"fill", "zero", "masked_fill", "normal", "uniform", "bernoulli", "exponential", "cauchy",
           "log_normal", "random", "scalar_tensor", "empty_like", "zeros_like", "ones_like",
           "full_like", "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full"}
_UNTAGGED = {"where", "floor_divide", "log_sigmoid_forward", "hardswish", "complex", "polar",
             "bucketize", "masked_select", "is_pinned"}  # elementwise, too
_PARTS = {"slice", "split", "split_with_sizes"}  # as of several slices, flattened into one
_SUMS = {"sum", "nansum"}
_LINEAR = _VIEWS | _SUMS | {"clone", "add", "sub", "rsub", "neg", "mul", "div", "mean", "select",
                            "unbind"}
_VALUES = {"item", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
_UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"  # torch's GradScaler


class _Operators(TorchDispatchMode):
    """Calls look(operator, its name, its arguments) for all that a function of torch comes down to,
    before each runs."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._can_decompose():  # under inference_mode() these come as a whole
            with self:
                return op.decompose(*args, **(kwargs or {}))
        self.look(op, _name(op), args)
        return op(*args, **(kwargs or {}))


@cache
def _name(op) -> str:
    """As in torch.ops.aten, without what says that it works in place or on a list of tensors."""
    name = op._schema.name.split("::")[-1].removeprefix("_foreach_")
    return name.removesuffix("_")


@cache
def _is_elementwise(op) -> bool:
    if _name(op) in _VIEWS | _WRITES | _UNTAGGED:
        return True
    packet = getattr(torch.ops.aten, _name(op), None)
    overloads = {"default", "Tensor", "Scalar", op._overloadname}  # those on lists have other names
    tags = [getattr(packet, name).tags for name in packet.overloads() if name in overloads
            ] if packet else []
    return any(torch.Tag.pointwise in t and torch.Tag.data_dependent_output not in t for t in tags)


def _takes_all_alike(op, args) -> bool:
    """Whether an index takes elements wherever they are: all of them, or by a mask."""
    if _name(op) == "slice":
        given = list(args[2:])
        start, end, step = given + [None, None, 1][len(given) :]
        return not start and (end is None or end >= 2**62) and step == 1
    return _name(op) in ("index", "index_put") and all(
        index is None or index.dtype == torch.bool for index in args[1])


def _reduction(op, args) -> int | None:
    """0, 1 or 2 of a loss function: none, mean or sum. Functions that have none: None."""
    names = [arg.name for arg in op._schema.arguments]
    if "reduction" not in names:
        return None
    position = names.index("reduction")
    return args[position] if position < len(args) else 1


class Marked(Tensor):
    """A tensor whose class tells where it came from. What is computed from it is marked, too, but
    for what is written into another tensor in place."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.autograd.backward, torch.autograd.grad):
            return func(*tree_map(unmarked, args), **tree_map(unmarked, kwargs))
        kind: Any = max((t for t in types if issubclass(t, Marked)), key=lambda t: t.precedence)
        name = getattr(func, "__name__", "").removeprefix("linalg_")
        in_place = name.endswith("_") or name.startswith("__i")
        with torch._C.DisableTorchFunctionSubclass():
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            with torch.no_grad() if in_place and not given[0].requires_grad else nullcontext():
                if kind is GradSlice and torch.is_grad_enabled() and any(
                        x.requires_grad for x in given):
                    kind = ParamSlice  # as where a loss weights parameters with a gradient
                result, mark = kind.call(name, func, args, kwargs, given)
            return tree_map(lambda x: x.as_subclass(mark) if mark and type(x) is Tensor
                            and not any(x is arg for arg in given) else x, result)

    def backward(self, *args, **kwargs):
        self.as_subclass(Tensor).backward(*args, **kwargs)

    def __format__(self, spec):
        return format(self.as_subclass(Tensor), spec)

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # what is saved is plain

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.clone())


class _Slice(Marked):

    @classmethod
    def call(cls, name, func, args, kwargs, given):
        """(result, what it is): of the function's operators, those that do not fit are refused."""
        if name in ("__repr__", "__get__", "__set__"):
            return func(*args, **kwargs), cls
        summed = False
        in_loss = cls is ParamSlice and torch.is_grad_enabled()

        def look(op, base, op_args):
            nonlocal summed
            reduction = _reduction(op, op_args)
            adds_up = base in _SUMS or reduction == 2
            fits = (cls.may_be_summed if adds_up else
                    reduction == 0 or _is_elementwise(op) or _takes_all_alike(op, op_args)
                    or (base in _PARTS and name != "__setitem__" and not in_loss))
            if not fits or (summed and base not in _VIEWS):
                cls.refuse(name)
            summed |= adds_up

        if name == _UNSCALE or (name in _VALUES and not cls.may_be_summed):
            cls.refuse(name)
        try:
            with _Operators(look):
                result = func(*args, **kwargs)
        except Refused:
            raise
        except (RuntimeError, IndexError) as error:  # as where sizes do not fit a slice's
            cls.refuse(name, error)
        if summed:
            return result, PartOfSum
        made_new = name.endswith("_like") or name.startswith("new_")
        return result, None if made_new and cls is ParamSlice else cls


class Refused(RuntimeError):
    """What would take a slice for the whole."""


class GradSlice(_Slice):
    """This rank's slice of a gradient, or what was computed from it, element by element."""

    precedence, may_be_summed = 0, False

    @classmethod
    def refuse(cls, name, cause=None):
        if name == _UNSCALE:
            raise Refused(
                "torch.amp.GradScaler sees only this rank's slice of the gradients: use "
                "zero_ref.GradScaler(model) instead, which takes the same arguments otherwise")
        raise Refused(
            f"`{name.strip('_')}` of a gradient's slice is not that of the gradient, and this "
            "rank has no more of it: what is computed element by element works, also with a mask; "
            "for a norm use model.clip_grad_norm_(max_norm), which returns the global norm and "
            "clips by it (math.inf: does not clip); model.grads_are_finite() asks all ranks; for "
            "elements at certain places use stage 0, or a hook that was registered on the module's "
            "own parameter before zero_ref.wrap") from cause


class ParamSlice(_Slice):
    """Computed element by element from slices of parameters, for a loss as a rule."""

    precedence, may_be_summed = 1, True

    @classmethod
    def refuse(cls, name, cause=None):
        raise Refused(
            f"`{name.strip('_')}` of a parameter's slice, which is all that this rank has of "
            "it, is not that of the parameter. In a loss, sums of squares or of absolute "
            "values are right, for every rank adds its part: `p.square().sum()`; a norm or a "
            "mean can be had at stage 0, of the module's own parameters at stages 1 and 2, and "
            "without a gradient of those inside `with model.full_params():` at every stage"
        ) from cause


class PartOfSum(Marked):
    """This rank's part of a sum over parameters, alone or added to a loss."""

    precedence = 2

    @classmethod
    def call(cls, name, func, args, kwargs, given):
        factors = sum(x.requires_grad or isinstance(x, cls) for x in given)
        wrong = [x for x in given if isinstance(x, _Slice) or getattr(x, "_is_slice", False)]

        def look(op, base, op_args):
            if base not in _LINEAR or (base in ("mul", "div") and factors > 1) or (
                    base == "div" and any(isinstance(x, cls) for x in op_args[1:])):
                wrong.append(base)

        with _Operators(look):
            result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if wrong and any(x.requires_grad for x in results):
            raise Refused(
                f"`{name.strip('_')}` of a sum over parameters, of which this rank has only its "
                "part, is not that of the whole sum, unless it adds it to something or scales it. "
                "In a loss, sums of squares or of absolute values are right as they are; for a "
                "root or a product of one use stage 0, or the module's own parameters at stages 1 "
                "and 2; loss.item() gives the loss with this rank's part")
        return result, None if wrong else cls


KINDS = GradSlice, ParamSlice, PartOfSum


@contextmanager
def without_marks() -> Iterator[None]:
    """For code that looks at many tensors and computes nothing: asking the class takes longer."""
    with torch._C.DisableTorchFunctionSubclass():
        yield


def unmarked(x):
    return x.as_subclass(Tensor) if isinstance(x, Marked) else x
