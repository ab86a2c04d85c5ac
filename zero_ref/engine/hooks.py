"""Hooks on the modules of a wrapped model, which a copy of such a module does not take along."""

from collections.abc import Callable


class Hook:
    """Calls a function. In a copy, and in what is pickled, it does nothing."""

    def __init__(self, fn: Callable):
        self.fn = fn

    def __call__(self, *args, **kwargs):
        return self.fn(*args, **kwargs)

    def __reduce__(self):
        return _a_hook_that_does_nothing, ()


def _a_hook_that_does_nothing():
    return _nothing


def _nothing(*args, **kwargs):
    pass
