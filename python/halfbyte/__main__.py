"""`python -m halfbyte ...`: the command `halfbyte`, for launchers that start modules (torchrun)."""

from halfbyte.cli import command_line

if __name__ == "__main__":
    command_line()
