"""How a fine-tuning run ends early: what a user can put right, and a signal."""


class FinetuneError(ValueError):
    """A setting, a data row or a file that does not fit; the message is one line and complete."""


class NonFinite(FinetuneError):
    """A step's loss or gradients are not finite."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run; the message is one line and says how to go on.

    number  the signal's
    """

    def __init__(self, number: int, message: str = "stopped at once") -> None:
        super().__init__(message)
        self.number = number
