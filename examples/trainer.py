"""transformers' Trainer on a 4-bit base with PEFT's LoRA.

    python examples/trainer.py --model ./my-model --text book.txt --out run

`--model` is a local Hugging Face folder. The text is cut into sequences; every token is learned.
"""

import argparse
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import halfbyte


def sequences(text: str, tokenizer, length: int) -> datasets.Dataset:
    ids = tokenizer(text)["input_ids"]
    cut = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)] or [ids]
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in cut])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a local Hugging Face folder")
    parser.add_argument("--text", required=True, type=Path, help="a text file")
    parser.add_argument("--out", default="trainer-run")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, quantization_config=halfbyte.NF4Config()
    )
    model = get_peft_model(
        model,
        LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    text = arguments.text.read_text(encoding="utf-8")
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            logging_steps=max(1, arguments.steps // 20),
            lr_scheduler_type="cosine",
            report_to=[],
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=sequences(text, tokenizer, arguments.length),
        # The learning rate stands here: Trainer takes it from nowhere else for a class of ours.
        optimizer_cls_and_kwargs=(halfbyte.optim.AdamW8bit, {"lr": 2e-4}),
    )
    trainer.train()
    model.save_pretrained(f"{arguments.out}/adapter")
    print(f"adapter: {arguments.out}/adapter")


if __name__ == "__main__":
    main()
