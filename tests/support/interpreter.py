"""A faster interpreter of Triton."""

import functools
import importlib.util

from ejmp_kernels import availability


def patch_once():
    """Let a jitted function that a kernel calls not replace triton.language's functions where its launch has done so.

    Triton's interpreter replaces them again at every such call, which takes a third of its time.
    """
    if importlib.util.find_spec("triton") is None or not availability.interpreted():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def languages(function):
        return [module for module in function.__globals__.values() if module is tl or module is tl.core]

    def call(function, *args, **kwargs):
        if any(tl.core.is_builtin(module.arange) for module in languages(function.fn)):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
