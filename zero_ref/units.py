"""Which submodules are units, and whether their parameters fit into flat buffers."""

from torch import nn


def find_units(module, units):
    """The unit modules by name, in the order of `module.named_modules()`, without the root."""
    named = {name: m for name, m in module.named_modules() if name}
    if units is None:
        names = {m: name for name, m in named.items()}
        return {names[m]: m for m in _default_units(module)}

    matches = _as_predicate(units)
    found = {name: m for name, m in named.items() if matches(m) and _has_parameters(m)}
    if not found and not matches(module):
        kinds = sorted({type(m).__name__ for m in module.modules() if _has_parameters(m)})
        raise ValueError(f"units={_describe(units)} matches no submodule with parameters in "
                         f"{type(module).__name__}; it has: {', '.join(kinds)}")
    for name, m in found.items():
        if type(m).forward is nn.Module.forward:
            raise ValueError(f"unit {name!r} is a {type(m).__name__}, which has no forward of its "
                             "own: name what is inside it instead")
        inner = [other for other in found if other.startswith(name + ".")]
        if inner:
            raise ValueError(f"units overlap: {inner[0]!r} lies inside {name!r}; match only one "
                             "of the two")
    return found


def _default_units(module):
    """Each child with parameters of the outermost ModuleLists and Sequentials."""
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        callable_child = type(child).forward is not nn.Module.forward  # not a bare container
        if listed and callable_child and _has_parameters(child):
            yield child
        elif not (listed and callable_child):
            yield from _default_units(child)


def _as_predicate(units):
    if callable(units) and not isinstance(units, type):
        return units
    if not all(isinstance(u, type) for u in (units if isinstance(units, tuple) else (units,))):
        raise ValueError(f"units={units!r}: give a module class, a tuple of classes, or a function "
                         "that takes a module and returns True or False")
    return lambda m: isinstance(m, units)


def _has_parameters(module):
    return next(module.parameters(), None) is not None


def _describe(units):
    units = units if isinstance(units, tuple) else (units,)
    return " or ".join(getattr(u, "__name__", repr(u)) for u in units)


def check_uniform(label, names, params):
    for what in ("dtype", "device"):
        first = getattr(params[0], what)
        for name, p in zip(names, params):
            if getattr(p, what) != first:
                raise ValueError(f"unit {label!r} mixes {what}s: {names[0]!r} is {first}, {name!r} "
                                 f"is {getattr(p, what)}; give them one {what}, or units of their "
                                 "own")


def check_storages(module):
    """Two parameters on one memory would come apart in the flat buffers."""
    seen = {}
    for name, p in module.named_parameters():
        if p.data_ptr() and seen.setdefault(p.data_ptr(), name) != name:
            raise ValueError(f"{name!r} and {seen[p.data_ptr()]!r} are two parameters that share "
                             "their memory; tie them by using one nn.Parameter in both places")
