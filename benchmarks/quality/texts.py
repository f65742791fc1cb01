"""The texts that quality is measured on: each split into a part for calibration and one held out.

    python -m benchmarks.quality.texts FOLDER

writes them to FOLDER, from Debian packages (downloaded and unpacked beside, not installed) and from
the PyPI package chatterbot-corpus:

    kjv       the King James Bible (bible-kjv, bible-kjv-text)
    jargon    the Jargon File (jargon-text)
    qa        question-answer pairs (chatterbot-corpus), no held-out question in the other part
    foreign   for calibration only: a satirical dictionary, a policy manual and quotations
              (dict-devil, debian-policy, fortunes)

Books are cut into passages of about 4,000 characters; every fourth passage is held out.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import tempfile
from pathlib import Path

SCORED = ("kjv", "jargon", "qa")
PACKAGES = ("bible-kjv", "bible-kjv-text", "jargon-text", "dict-devil", "debian-policy", "fortunes")
PASSAGE, EVERY = 4000, 4  # characters a passage; one of so many is held out
FORTUNES = ("computers", "science", "wisdom", "literature", "people", "work", "definitions")


def read(folder: Path, name: str, part: str) -> str:
    """One text: `part` is "calibration" or "held-out"."""
    path = folder / f"{name}.{part}.txt"
    if not path.exists():
        raise SystemExit(f"{path}: no such text; run: python -m benchmarks.quality.texts {folder}")
    return path.read_text(encoding="utf-8")


def unwrapped(text: str) -> list[str]:
    """Paragraphs, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def passages(paragraphs: list[str]) -> list[str]:
    """Neighbouring paragraphs together, up to about PASSAGE characters."""
    made, current = [], ""
    for paragraph in paragraphs:
        current += paragraph + "\n\n"
        if len(current) > PASSAGE:
            made.append(current)
            current = ""
    return [*made, current] if current else made


def split(pieces: list[str]) -> tuple[str, str]:
    """(calibration, held out)."""
    held_out = pieces[EVERY - 1 :: EVERY]
    rest = [piece for i, piece in enumerate(pieces) if i % EVERY != EVERY - 1]
    return "".join(rest), "".join(held_out)


def unpack(folder: Path) -> None:
    """The Debian packages' files under `folder`."""
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)


def unzipped(path: Path) -> str:
    with gzip.open(path) as file:
        return file.read().decode("utf-8", errors="replace")


def bible(root: Path) -> list[str]:
    """A paragraph a chapter, without verse numbers."""
    # The program opens data files by relative paths only.
    command = ["./bible", "-d", "../lib/bible.data", "gen1:1-rev22:21"]
    printed = subprocess.run(
        command, cwd=root / "usr/bin", capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout
    chapters = re.split(r"\n(?=[1-3]? ?[A-Z][A-Za-z ]+ \d+\n)", printed)
    bodies = (chapter.split("\n", 1)[-1] for chapter in chapters if chapter.strip())
    return [" ".join(re.sub(r"^\s*\d+ ", "", body, flags=re.M).split()) for body in bodies]


def jargon(root: Path) -> list[str]:
    """Paragraphs of prose: tables, lists of links and drawings are left out."""
    text = unzipped(root / "usr/share/doc/jargon-text/jargon.txt.gz")
    prose = re.compile(r"[a-z]{3}.*[a-z]{3}")
    return [p for p in unwrapped(text) if len(p) > 60 and prose.search(p) and "─" not in p]


def foreign(root: Path) -> list[str]:
    """Passages of the three in turn."""
    devil = unwrapped(unzipped(root / "usr/share/dictd/devil.dict.dz"))[4:]
    policy = unwrapped(unzipped(root / "usr/share/doc/debian-policy/policy.txt.gz"))
    quotations = []
    for name in FORTUNES:
        path = root / "usr/share/games/fortunes" / name
        if path.exists():
            quotations += [" ".join(q.split()) for q in path.read_text().split("\n%\n")]
    parts = [passages(p) for p in (devil, [p for p in policy if len(p) > 60], quotations)]
    return [part[i] for i in range(min(map(len, parts))) for part in parts]


def questions() -> tuple[str, str]:
    """(calibration, held out) of the chatterbot corpus; a question stands in one of them only."""
    from halfbyte.finetune import demo

    package = demo._package_folder(demo.CORPUS_PACKAGE, demo.CORPUS_REQUIREMENT)
    answers: dict[str, list[str]] = {}
    for question, answer in demo.read_pairs(package / "data" / "english"):
        if question and answer:
            answers.setdefault(question, []).append(answer)
    pieces = [
        "".join(f"Question: {question}\nAnswer: {answer}\n\n" for answer in dict.fromkeys(given))
        for question, given in answers.items()
    ]
    return split(pieces)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        unpack(root)
        parts = {
            "kjv": split(passages(bible(root))),
            "jargon": split(passages(jargon(root))),
            "qa": questions(),
            "foreign": ("".join(foreign(root)), ""),
        }
    for name, (calibration, held_out) in parts.items():
        for part, text in (("calibration", calibration), ("held-out", held_out)):
            if text:
                (folder / f"{name}.{part}.txt").write_text(text, encoding="utf-8")
                print(f"{name}, {part}: {len(text):,} characters")


def main(arguments: list[str] | None = None) -> None:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("folder", type=Path, metavar="FOLDER")
    write(command.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
