"""Names of bitsandbytes that halfbyte has nothing for."""


class NotOffered(NotImplementedError):
    """halfbyte has no such operation."""


def absent(name: str) -> type:
    """A class of that name whose construction, or call, raises `NotOffered`."""

    def refuse(*args, **kwargs):
        raise NotOffered(f"{name}: not offered by halfbyte")

    return type(name, (), {"__new__": refuse})
