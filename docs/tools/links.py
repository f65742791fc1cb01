"""A hook of mkdocs: links to files of the repository that are not pages become their paths.

`[the interpreter](../tests/ptx_interpreter/README.md)` works where the repository is read; on the
site it is `the interpreter (tests/ptx_interpreter/README.md)`.
"""

import posixpath
import re

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def shown(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2].partition("#")[0]))
        return match[0] if path.startswith("docs/") else f"{match[1]} (`{path}`)"

    return LINK.sub(shown, markdown)
