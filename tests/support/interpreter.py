"""Triton's interpreter, in less than half of its time."""

from dataclasses import replace
from importlib import import_module
from typing import Any


def hasten() -> None:
    """Let the interpreter leave out what it does again and again and what finds nothing here.

    It prepares ``triton.language`` at each call of a function within a kernel, with a look at all that the module has;
    once a launch is enough. And it looks for overflow after every operation on integers, which sizes that it can
    interpret in a test do not come near to. Where a version names these otherwise, it stays as slow as it is.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    prepare, language, prepared = interpreter._patch_lang, interpreter.tl, set[frozenset[int]]()

    def prepare_once(function: Any) -> Any:
        # A function sees the language under one of two names, and each is prepared by itself.
        names = function.__globals__.values()
        seen = frozenset(id(value) for value in names if value is language or value is language.core)
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
    numpys, find = dict[str, Any](), interpreter._get_np_dtype

    def numpy_of(dtype: Any) -> Any:
        return numpys.get(dtype.name) or numpys.setdefault(dtype.name, find(dtype))

    interpreter._get_np_dtype = numpy_of
    _remember_shapes(language.core)


def _remember_shapes(core: Any) -> None:
    """Each number of a kernel makes a type of its shape, and a tuple of that: there are few, and they never change."""
    of_type, of_tensor = core.block_type.__init__, core.tensor.__init__
    types, shapes = dict[Any, dict[str, Any]](), dict[str, tuple[Any, Any]]()

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in types:
            of_type(self, element_ty, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key], element_ty=element_ty)

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            of_tensor(self, handle, type)
            shapes[type.name] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[type.name]

    core.block_type.__init__, core.tensor.__init__ = make_type, make_tensor
