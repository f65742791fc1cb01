"""What `halfbyte finetune` does around a run, with exchanges without end as the run.

... worker_lost.py FOLDER: each process leaves FOLDER/<rank>, which holds its process id.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import typer

from halfbyte.cli.errors import plain_errors
from halfbyte.cli.finetune import stop_on_sigterm
from halfbyte.finetune import processes


def main() -> None:
    stop_on_sigterm()
    with plain_errors(), processes.one_voice(), processes.joined():
        dist.barrier()
        (Path(sys.argv[1]) / str(processes.rank())).write_text(str(os.getpid()))
        while True:
            dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as end:
        sys.exit(end.exit_code)
