"""What a rank's optimizer sees of a parameter and of its gradient.

From stage 1 on these are slices, and marked as such by their class: a norm or a sum of a slice is
not that of the whole, and every rank would go on with another number. What comes out of a slice is
marked, too; what would reduce it is refused, with the way that is right. While an optimizer steps,
the marks are off, so that its states are plain tensors, and types those that torch optimizes for.
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# Functions of one tensor that are not elementwise, by name: as torch.f, Tensor.f, torch.linalg.f.
_NORMS = {
    "norm", "vector_norm", "matrix_norm", "_foreach_norm", "dist", "mean", "nanmean", "var", "std",
    "var_mean", "std_mean", "max", "min", "amax", "amin", "aminmax", "argmax", "argmin",
    "_foreach_max", "median", "nanmedian", "mode", "quantile", "nanquantile", "kthvalue", "prod",
    "logsumexp", "softmax", "log_softmax", "all", "any", "count_nonzero", "nonzero", "equal",
    "allclose", "histc", "unique", "sort", "argsort", "topk", "cumsum", "cumprod", "dot", "vdot",
    "inner", "cosine_similarity", "normalize", "layer_norm", "renorm", "batch_norm",
    "bmm", "addmv", "addmm", "addbmm", "baddbmm", "addr", "linear", "einsum", "tensordot", "cdist",
    "pairwise_distance", "svdvals", "sum_to_size", "index_add", "index_add_", "scatter_add",
    "scatter_add_", "index_reduce_", "scatter_reduce", "histogram", "bincount", "cummax", "cummin",
    "logcumsumexp", "argwhere", "avg_pool1d", "max_pool1d", "matmul", "__matmul__",
    "__rmatmul__", "mm", "mv", "cov"}
_SUMS = {"sum", "nansum"}
_PICKS = {"__getitem__", "index_select", "masked_select", "gather", "take"}  # others on every rank
_VALUES = {"item", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
# What is not linear, so that of parts of a sum it does not give what it gives of the sum.
_NOT_LINEAR = {"sqrt", "sqrt_", "rsqrt", "rsqrt_", "pow", "pow_", "__pow__", "__rpow__", "square",
               "square_", "exp", "exp_", "log", "log_", "log1p", "reciprocal", "__rtruediv__",
               "__rdiv__", "float_power", "norm", "vector_norm", "prod", "abs", "relu", "clamp",
               "max", "min", "maximum", "minimum", "log2", "log10", "expm1", "sigmoid", "tanh",
               "softplus"}
_UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"  # torch's GradScaler


class Marked(Tensor):
    """A tensor whose class tells where it came from. All that is computed from it is of that class,
    except for what the class refuses, and for what is written into another tensor in place."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = _name(func)
        if func is torch.autograd.backward:  # the turn of MasterParameter, if it is among inputs
            return func(*tree_map(unmarked, args), **(kwargs or {}))
        cls.refuse(name, args)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if cls.reduces(name, kwargs or {}) and isinstance(result, Tensor) and result.ndim == 0 and (
                any(x.ndim for x in tree_leaves(args) if isinstance(x, Tensor))):
            cls.refuse("norm", args)
        return tree_map(lambda x: x.as_subclass(cls) if type(x) is Tensor and cls.marks(x)
                        and not any(x is arg for arg in args) else x, result)

    @classmethod
    def refuse(cls, name: str, args: tuple) -> None:
        """Raise RuntimeError if a function of this name does not fit."""

    @classmethod
    def reduces(cls, name: str, kwargs: dict) -> bool:
        """Whether a single number would be wrong as the function's result."""
        return name not in _PICKS

    @classmethod
    def marks(cls, result: Tensor) -> bool:
        """Whether a result is marked: of what is to be differentiated, only what has a graph."""
        return result.requires_grad

    def backward(self, *args, **kwargs):
        self.as_subclass(Tensor).backward(*args, **kwargs)

    def __format__(self, spec):
        return format(self.as_subclass(Tensor), spec)

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # what is saved is plain

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.clone())


class GradSlice(Marked):
    """This rank's slice of a gradient, or what was computed from it, element by element."""

    @classmethod
    def marks(cls, result):
        return True

    @classmethod
    def refuse(cls, name, args):
        if name == _UNSCALE:
            raise RuntimeError(
                "torch.amp.GradScaler sees only this rank's slice of the gradients: use "
                "zero_ref.GradScaler(model) instead, which takes the same arguments otherwise")
        if name in _NORMS | _SUMS | _VALUES and not _of_two(name, args):
            raise RuntimeError(
                f"`{name.strip('_')}` of a gradient's slice is not that of the gradient, and this "
                "rank has no more of it: use model.clip_grad_norm_(max_norm), which returns the "
                "global norm and clips by it (math.inf: does not clip), or "
                "model.grads_are_finite(), which asks all ranks")


_IS_LOCAL = ("this gradient is local, for the last backward ran inside no_sync(): the next one "
             "outside of it reduces what has added up; optimizer.zero_grad() drops it")


class LocalGrad(GradSlice):
    """In place of a gradient that no_sync() has left in the module and that is yet to be reduced.
    It has no memory. Whoever drops it, or zeroes it, drops what no_sync() has left."""

    zeroed = False
    data = property(lambda self: self)  # type: ignore[assignment]  # for p.grad.data.zero_()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("zero_", "_foreach_zero_"):
            grads = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            for grad in grads:
                if isinstance(grad, LocalGrad):
                    grad.zeroed = True
            others = [g for g in grads if not isinstance(g, LocalGrad)]
            return func(others, **(kwargs or {})) if others else args[0]
        if func.__name__ == "detach":
            return args[0]
        if func.__name__ in ("__get__", "requires_grad_", "detach_", "size", "numel", "dim",
                             "untyped_storage", "element_size", "is_floating_point", "is_complex"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(_IS_LOCAL)

    def __repr__(self):
        return "LocalGrad: left by no_sync(), not reduced"

    __str__ = __repr__


class InLoss(Marked):
    """Computed element by element from slices of parameters, for a loss."""

    @classmethod
    def reduces(cls, name, kwargs):
        return name not in _PICKS | _SUMS and kwargs.get("reduction") != "sum"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, InLoss) and (
                _name(func) in _SUMS or (kwargs or {}).get("reduction") == "sum"):
            return result.as_subclass(PartOfSum)
        return result

    @classmethod
    def refuse(cls, name, args):
        if (name in _NORMS and not _of_two(name, args)) or (
                name in _PICKS and torch.is_grad_enabled()):
            raise RuntimeError(
                f"`{name.strip('_')}` of a parameter's slice, which is all that this rank has of "
                "it, is not that of the parameter. In a loss, sums of squares or of absolute "
                "values are right, for every rank adds its part: `p.square().sum()`; a norm or a "
                "mean can be had at stage 0, of the module's own parameters at stages 1 and 2, and "
                "without a gradient of those inside `with model.full_params():` at every stage")


class PartOfSum(Marked):
    """This rank's part of a sum over parameters, alone or added to a loss."""

    @classmethod
    def reduces(cls, name, kwargs):
        return False

    @classmethod
    def refuse(cls, name, args):
        if name in _NOT_LINEAR:
            raise RuntimeError(
                f"`{name.strip('_')}` of a sum over parameters, of which this rank has only its "
                "part, is not that of the whole sum. In a loss, sums of squares or of absolute "
                "values are right as they are; for a root of one use stage 0, or the module's own "
                "parameters at stages 1 and 2; to look at a loss, use loss.detach() or loss.item()")


def unmarked(x):
    return x.as_subclass(Tensor) if isinstance(x, Marked) else x


def plain(grad: Tensor) -> Tensor:
    """A reduced gradient without its mark."""
    if isinstance(grad, LocalGrad):
        raise RuntimeError(_IS_LOCAL)
    return grad.as_subclass(Tensor)


def _name(func):
    return getattr(func, "__name__", "").removeprefix("linalg_")


def _of_two(name, args):
    """max(a, b) is elementwise."""
    return name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)


class MasterParameter(nn.Parameter):
    """A parameter of `model.parameters()`. Its gradient is set, not accumulated by autograd."""

    _is_slice = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.autograd.grad:
            raise RuntimeError(
                "autograd works on the module's own parameters, not on those of "
                "model.parameters(): call loss.backward(), or give torch.autograd.grad "
                "`[*model.module.parameters()]`, at stages 0 to 2")
        if func is torch.autograd.backward and (inputs := (kwargs or {}).get("inputs")):
            # Those that a loss uses itself get gradients of their own, see InLoss.
            inputs = [inputs] if isinstance(inputs, Tensor) else [*inputs]
            kwargs["inputs"] = [*inputs, *(p._original for p in inputs if isinstance(p, cls))]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = _name(func)
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__get__", "__set__") or not any(
                    getattr(leaf, "_is_slice", False) for leaf in tree_leaves((args, kwargs))):
                return func(*args, **(kwargs or {}))
            in_place = name.endswith("_") and not name.endswith("__")
            if in_place or not (torch.is_grad_enabled() or name in _NORMS):
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map(
                lambda x: x.as_subclass(InLoss) if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _write(self, values):
        if values.shape != self.shape or values.dtype != self.dtype:
            raise RuntimeError(
                f"a parameter of {tuple(self.shape)} and {self.dtype} cannot have the .data of "
                f"{tuple(values.shape)} and {values.dtype}: it lies in a flat buffer; only values "
                "of the same shape and dtype can be copied there")
        with torch.no_grad():
            self.copy_(values)

    # A detached tensor shares the version counter, by which forward sees that values are new.
    data = property(lambda self: self.detach(), _write)  # type: ignore[assignment]

    def register_hook(self, hook):
        raise RuntimeError("a hook on a parameter of model.parameters() would never run, for "
                           "autograd works on the bare module's parameters: change p.grad after "
                           "backward")

    register_post_accumulate_grad_hook = register_hook

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), self.requires_grad))


def master_parameter(view: Tensor, original: nn.Parameter, span: tuple[int, int] | None
                     ) -> nn.Parameter:
    """What the optimizer sees of a parameter, with the attributes that the user gave to it.
    span: which elements of it these are, or None if it is the whole."""
    p = MasterParameter(view, requires_grad=original.requires_grad)
    p.__dict__.update(original.__dict__)
    p._original, p._is_slice = original, span is not None
    p._elements = "all" if span is None else f"{span[0]} to {span[1]}"
    return p


def show_local(units) -> None:
    """At the end of a backward inside no_sync(): the optimizer's parameters show that the module
    has gradients which are yet to be reduced."""
    with torch._C.DisableTorchFunctionSubclass():
        for unit in units:
            for index, (p, own) in enumerate(zip(unit.master_params, unit.params)):
                if own.grad is not None:
                    if p.grad is None:
                        if index not in unit.local_marks:
                            unit.local_marks[index] = _local_mark(p)
                        p.grad = unit.local_marks[index]
                    unit.local[index] = p.grad, p.grad._version


def _local_mark(p):
    held = Tensor._make_subclass(LocalGrad, torch.empty_like(p))
    held.untyped_storage().resize_(0)
    return held


def hide_local(units) -> None:
    """Before the next backward or step: what was dropped or zeroed there is dropped here, too."""
    with torch._C.DisableTorchFunctionSubclass():
        for unit in units:
            for index, (shown, version) in unit.local.items():
                p = unit.master_params[index]
                gone, changed = p.grad is None, p.grad is not shown or shown._version != version
                if isinstance(shown, LocalGrad):
                    gone, changed, shown.zeroed = gone or shown.zeroed, p.grad is not shown, False
                elif changed and not gone:
                    gone = not p.grad.any()
                if changed and not gone:
                    raise RuntimeError(
                        f"the gradient of {unit.names[index]!r} was changed while no_sync() has "
                        "left another part of it, which is not reduced yet: change gradients after "
                        "the backward that reduces")
                if gone:
                    unit.params[index].grad = None
                if p.grad is shown and isinstance(shown, LocalGrad):
                    p.grad = None
            unit.local = {}


def mark(units, on: bool) -> None:
    """Mark what an optimizer sees, or while it steps show it plain parameters and gradients."""
    with torch._C.DisableTorchFunctionSubclass():
        for unit in units:
            for p in unit.master_params:
                p.__class__ = MasterParameter if on else nn.Parameter
                if p._is_slice and p.grad is not None:
                    p.grad = p.grad.as_subclass(GradSlice if on else Tensor)
