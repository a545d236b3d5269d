"""Cascade classes, made on demand: subclasses of ours and a diffusers pipeline, with the arguments of both."""

import inspect
from typing import Any

from .checks import check_misplaced

# Arguments of a stock call that the stages set.
_SET_BY_STAGES = ("latents", "sigmas", "timesteps", "denoising_end")


def cascade_class(ours: Any, stock: Any) -> Any:
    """The class of `ours` around a text-to-image pipeline, whose call takes that pipeline's arguments as well."""
    own = inspect.signature(ours.__call__).parameters
    theirs = inspect.signature(stock.__call__).parameters
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for name, one in theirs.items():
        if name in _SET_BY_STAGES:
            kind = inspect.Parameter.KEYWORD_ONLY  # later positions no longer match
        elif one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            default = one.default if name == "self" or one.default is not one.empty else None
            parameters.append(own[name].replace(kind=kind) if name in own else one.replace(kind=kind, default=default))
    extra = [one for name, one in own.items() if name not in theirs and one.kind == one.KEYWORD_ONLY]
    parameters += [one for one in extra if one.name != "callback_on_step_end"]  # the stock call lacks it
    signature = inspect.Signature(parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        check_misplaced(kwargs, signature.parameters)
        return ours.__call__(**signature.bind(*args, **kwargs).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = ours.__call__.__doc__
    name = stock.__name__.replace("Pipeline", "HighResolutionPipeline")
    return type(name, (ours, stock), {"stock": stock, "__call__": call, "__module__": ours.__module__})


def build_from(cls: Any, pipeline: Any) -> Any:
    """A pipeline of this class from the components and flags (such as `requires_safety_checker`) of another."""
    flags = {name: value for name, value in pipeline.config.items() if isinstance(value, bool | int | float)}
    expected = inspect.signature(cls.__init__).parameters
    return cls(**{name: one for name, one in {**flags, **pipeline.components}.items() if name in expected})
