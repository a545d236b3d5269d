"""What conversion raises beside plain ValueErrors."""


class UnsupportedModelError(ValueError):
    """This model, or the state it is in, cannot be converted."""


class LayoutError(ValueError):
    """The image tokens of this call are not laid out in a way that a window can be right on."""


class KernelNotReachedError(RuntimeError):
    """A converted attention module ran without its linear kernel, or with two of them."""
