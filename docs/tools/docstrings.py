"""An extension of griffe: docstrings as they are written here, shown as Markdown.

A table between two rulers of equals signs, `=====  ====`, is preformatted. Brackets that follow
each other, "E[x x^T] [K, K]", are no link.
"""

import re

import griffe

TABLE = re.compile(r"^(=+(?: +=+)+)\n(.*?)\n\1$", re.M | re.S)
BRACKETS = re.compile(r"^(?!    ).*\] \[.*$", re.M)


class WrittenAsText(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            text = TABLE.sub(r"```text\n\2\n```", obj.docstring.value)
            text = BRACKETS.sub(lambda line: line[0].replace("] [", "\\] ["), text)
            obj.docstring.value = text
