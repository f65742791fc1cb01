"""The one exception of a fine-tuning run that a user can put right."""


class FinetuneError(ValueError):
    """A setting, a data row or a file that does not fit; the message is one line and complete."""
