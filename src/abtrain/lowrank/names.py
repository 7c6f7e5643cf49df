"""Names of parameters and buffers, as the user's model has them."""


def without_compiled(name: str) -> str:
    """The name without the segments `_orig_mod` that torch.compile adds, anywhere in it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
