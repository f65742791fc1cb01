"""TRL's SFTTrainer on a 4-bit base: chat rows in, an adapter out.

    python examples/sft_trainer.py --model ./my-model --data chat.jsonl --out run

Rows are {"prompt": ..., "completion": ...} or {"messages": [...]}, one JSON object a line. With
checks, held-out loss, checkpoints and a report the same is `halfbyte finetune`.
"""

import argparse

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import halfbyte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a local Hugging Face folder")
    parser.add_argument("--data", required=True, help="a .jsonl file")
    parser.add_argument("--out", default="sft-run")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    rows = datasets.load_dataset("json", data_files=arguments.data, split="train")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.bfloat16, quantization_config=halfbyte.NF4Config()
        ),
        args=SFTConfig(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            logging_steps=max(1, arguments.steps // 20),
            lr_scheduler_type="cosine",
            report_to=[],
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        optimizer_cls_and_kwargs=(halfbyte.optim.PagedAdamW8bit, {"lr": 2e-4}),
    )
    trainer.train()
    trainer.model.save_pretrained(f"{arguments.out}/adapter")
    print(f"adapter: {arguments.out}/adapter")


if __name__ == "__main__":
    main()
