"""QLoRA fine-tuning on a 4-bit base: what the command `halfbyte finetune` runs, as a library.

    config.py   FinetuneConfig: every setting, its type, default and help, once; YAML and overrides
    data.py     JSONL rows, checked; the fixed split into training and held-out rows
    encode.py   rows -> token ids and labels, with the loss on completions only
    base.py     the base model: a Hugging Face folder or a GGUF file, checked before it is loaded
    plan.py     all checks of a run, before a weight is read
    trainer.py  TRL's SFTTrainer with the language-model head run on completion tokens only
    sampler.py  batches of rows of similar length, in random order
    run.py      the whole run: load, quantize, evaluate, train, evaluate, write
    processes.py  the same run in several processes
    metrics.py  metrics.jsonl; chart.py draws the loss curve from it
    report.py   what a person sees while it runs
    files.py    files written aside, fsynced, renamed
    demo.py     SmolLM2-135M-Instruct on the chatterbot corpus

Library code raises `FinetuneError` (one complete line) for everything a user can put right; only
`report.py` prints.
"""

from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.errors import FinetuneError

__all__ = ["FinetuneConfig", "FinetuneError"]
