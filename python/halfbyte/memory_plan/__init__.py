"""What a fine-tuning step needs in memory, from the model's shape alone: nothing is loaded or run.

    shapes    a decoder's sizes, by name or from a Hugging Face config.json
    plan      bytes by category of one process on one device, and their peak
    devices   what cards hold, and the rates that bound a step
    scaling   FSDP2 and DDP: bytes and communication of each of several processes
    figures   the QLoRA paper's figures as settings of the same calculator

All sizes are bytes; GB are 10^9 bytes.
"""

from halfbyte.memory_plan.devices import DEVICES, Device
from halfbyte.memory_plan.figures import PAPER_GB, paper_plan
from halfbyte.memory_plan.plan import CATEGORIES, Plan, Settings, plan
from halfbyte.memory_plan.scaling import RankPlan, rank_plan, scaling_table, shard_bytes
from halfbyte.memory_plan.shapes import SHAPES, Shape, load_shape, shape_from_config

__all__ = [
    "CATEGORIES",
    "DEVICES",
    "PAPER_GB",
    "SHAPES",
    "Device",
    "Plan",
    "RankPlan",
    "Settings",
    "Shape",
    "load_shape",
    "paper_plan",
    "plan",
    "rank_plan",
    "scaling_table",
    "shape_from_config",
    "shard_bytes",
]
