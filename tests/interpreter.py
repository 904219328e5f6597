"""Triton's interpreter, in half of its time."""

from importlib import import_module
from typing import Any


def patch_language_once() -> None:
    """Let the interpreter prepare ``triton.language`` once a launch.

    It does so again, with a look at all that the module has, at each call of a function within a kernel, which takes
    half of the time of small kernels and changes nothing. Where a version names it otherwise, it stays slow.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare, language, prepared = interpreter._patch_lang, interpreter.tl, set[frozenset[int]]()

    def prepare_once(function: Any) -> Any:
        # A function sees the language under one of two names, and each is prepared by itself.
        seen = frozenset(
            id(value) for value in function.__globals__.values() if value is language or value is language.core
        )
        if seen in prepared:
            return interpreter._LangPatchScope()  # which has nothing to put back
        scope = prepare(function)
        put_back = scope.restore

        def end() -> None:  # of the launch; what is called within one is left as it is
            prepared.clear()
            put_back()

        prepared.add(seen)
        scope.restore = end
        return scope

    interpreter._patch_lang = prepare_once
