"""Figure 6 of the QLoRA paper (Dettmers et al. 2023) as settings of the calculator.

Its totals, for LLaMA with adapters of rank 64 on all linear layers, batch 1, sequence 512:

    7B 6.9 GB    13B 11.3 GB    33B 24.7 GB    65B 45.0 GB

Assumed to be counted:

    4-bit weights    all linear layers but the head: NF4, blocks of 64, double quantization
    dense weights    embeddings, head and norms in fp32, as PEFT's preparation leaves them
    adapters         bf16; their gradients too
    optimizer        AdamW with fp32 state: 8 bytes a trainable parameter
    input gradients  of one layer at a time (checkpointing), "only for adapters and base weights":
                     x of its seven linear layers, in bf16
    runtime          a CUDA context, 0.5 GB: the paper measures 5,048 MB for the 7B base, 0.66 GB
                     more than its weights by this count

No constant is fitted. What is left over is in docs/scaling.md.
"""

from __future__ import annotations

import dataclasses

from halfbyte.memory_plan.plan import CUDA_CONTEXT, Plan, Settings, plan
from halfbyte.memory_plan.shapes import SHAPES

PAPER_GB = {"LLaMA-7B": 6.9, "LLaMA-13B": 11.3, "LLaMA-33B": 24.7, "LLaMA-65B": 45.0}


def paper_plan(name: str) -> Plan:
    """The calculator under the paper's counting, for a name of PAPER_GB."""
    shape = SHAPES[name]
    settings = Settings(
        rank=64, checkpointing=True, optimizer="adamw32", adapter=2, dense=4, sequence=512
    )
    inputs = sum(k for _, k in shape.linears.values()) * settings.item * settings.tokens
    made = plan(shape, settings, "cuda")
    return dataclasses.replace(made, activations=inputs, loss=0, layer=0, runtime=CUDA_CONTEXT)
