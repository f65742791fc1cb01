"""Greedy generation with transformers' `generate`: tokens/s with a LoRA adapter attached, without.

    python -m benchmarks.python.generate [--model smollm2,tinyllama] [--layers N] [--tokens 32]
                                         [--prompt 16] [--rank 16] [--rounds 5]

halfbyte, PEFT + bitsandbytes in eval mode (its AVX512-BF16 kernel where the processor has it) and
PEFT on dense bf16, in one process and in turns; the time is the median of a whole `generate` call,
prompt included, always the same number of new tokens. Checked first: the logits of the prompt
against the dense model of the dequantized weights in float32 (`logits error`, relative), where
twice the error of the dense model in bf16 is allowed. `same tokens` counts the new tokens up to the
first that is not the float32 model's: correct systems part where two logits nearly tie. Models are
described in models.py. Writes generate.csv.

Example: python -m benchmarks.python.generate --model tinyllama --layers 4 --tokens 16
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.python import models, peers, timing

TEXT = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees. The days "
    "of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and"
)
SLACK = 2.0, 5e-3  # a system's logits error: this many times the dense model's, plus this


def build(system: str, folder: Path, rank: int | None):
    """A model in eval mode, with an adapter that is not zero if `rank`."""
    model = models.load_base(system, folder)
    if rank:
        model = models.add_adapter(system, model, rank, started=True)
    return model.eval()


def make_prompt(folder: Path, vocabulary: int, length: int) -> torch.Tensor:
    """`length` tokens [1, length]: of a text where the model has a tokenizer, else random."""
    if not (folder / "tokenizer.json").exists():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (1, length), generator=generator)
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    return torch.tensor([(tokens * length)[:length]])


def generator_of(model, prompt: torch.Tensor, tokens: int):
    """A call that generates `tokens` tokens, no fewer, greedily."""
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(prompt)

    def generate() -> torch.Tensor:
        made = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return made[0, prompt.shape[1] :]

    return generate


@torch.no_grad()
def prompt_logits(model, prompt: torch.Tensor) -> torch.Tensor:
    return model(input_ids=prompt).logits.float()


def check(errors: dict[str, float]) -> None:
    """Logits errors against that of the dense model. Raises ValueError."""
    allowed = SLACK[0] * errors["PEFT bf16"] + SLACK[1]
    for system, error in errors.items():
        if not error <= allowed:
            raise ValueError(
                f"{system}: expected a logits error up to {allowed:.3f}, got {error:.3f}"
            )


def common_prefix(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many first elements agree."""
    differing = (a != b).nonzero()
    return int(differing[0]) if len(differing) else len(a)


def note(system: str, model) -> str:
    """Which of bitsandbytes' paths ran; called after a forward pass."""
    if system != "PEFT + bitsandbytes":
        return ""
    import bitsandbytes

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    packed = sum(peers.on_fast_path(layer) for layer in layers)
    return f"eval kernel in {packed} of {len(layers)} layers"


def compare_adapter(folder: Path, name: str, rank: int | None, options) -> list[dict]:
    """One row a system, with an adapter of `rank` or without."""
    with peers.quiet():
        built = {system: build(system, folder, rank) for system in models.SYSTEMS}
    exact = copy.deepcopy(built["PEFT bf16"]).float()
    prompt = make_prompt(folder, exact.config.vocab_size, options.prompt)
    expected = prompt_logits(exact, prompt)
    tokens = generator_of(exact, prompt, options.tokens)()
    del exact
    calls, errors, same = {}, {}, {}
    for system, model in built.items():
        errors[system] = ((prompt_logits(model, prompt) - expected).norm() / expected.norm()).item()
        calls[system] = generator_of(model, prompt, options.tokens)
        same[system] = common_prefix(calls[system](), tokens)
    check(errors)
    taken = timing.sample(calls, turns=options.rounds, seconds=float("inf"))
    seconds = {system: statistics.median(times) / 1e3 for system, times in taken.items()}
    table = []
    for system in models.SYSTEMS:
        row = {
            "model": name,
            "adapter": f"r={rank}" if rank else "none",
            "prompt": options.prompt,
            "new tokens": options.tokens,
            "system": system,
            "tokens/s": options.tokens / seconds[system],
        }
        for peer in models.SYSTEMS[1:]:
            row[f"vs {peer}"] = seconds[peer] / seconds[system]
        table.append(
            row
            | {
                "logits error": errors[system],
                "same tokens": same[system],
                "note": note(system, built[system]),
            }
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    some_models = timing.names(models.NAMES)
    command.add_argument("--model", type=some_models, default=["smollm2", "tinyllama"])
    command.add_argument("--layers", type=int, help="of tinyllama and llama7b; default: all")
    command.add_argument("--tokens", type=int, default=32)
    command.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--rounds", type=int, default=5)
    options = command.parse_args(arguments)
    timing.print_birthplace()
    table = []
    for model in options.model:
        layers = options.layers if model != "smollm2" else None
        with tempfile.TemporaryDirectory() as scratch:
            with peers.quiet():
                folder = models.prepare(model, layers, Path(scratch))
            for rank in (None, options.rank):
                rows = compare_adapter(folder, models.describe(model, layers), rank, options)
                timing.print_table("Greedy generation", rows)
                table += rows
    timing.write_csv(options.output / "generate.csv", table)


if __name__ == "__main__":
    main()
