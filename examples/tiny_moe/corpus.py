"""Real text of clearly different domains, read from Debian packages and the Python standard library.

Only `pretrain.py` and `build_tasks.py` need it; what they produce is shipped. `load_domain(name, cache)` returns
`{document name: text}`; `is_held_out(name)` says which documents training never sees.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path


PACKAGES = {
    "german": ["manpages-de", "manpages-de-dev"],
    "japanese": ["manpages-ja", "manpages-ja-dev"],
    "russian": ["manpages-ru", "manpages-ru-dev"],
    "english": ["manpages", "manpages-dev"],
    "scripture": ["bible-kjv", "bible-kjv-text"],
    "french": ["manpages-fr", "manpages-fr-dev"],
}
PRETRAINING_DOMAINS = ("german", "japanese", "russian", "english", "scripture", "python")
"""French is left out on purpose: it is the language that the base has never seen."""

_SPECIAL = {
    "(co": "©", "(em": "—", "(en": "–", "(aq": "'", "(dq": '"', "(cq": "’", "(oq": "‘", "(lq": "“", "(rq": "”",
    "(bu": "•", "(ti": "~", "(ha": "^", "(mu": "×", "(->": "→", "(Fo": "«", "(Fc": "»", "(rs": "\\", "(ga": "`",
}  # fmt: skip


def is_held_out(name: str) -> bool:
    """True for the tenth of the documents, chosen by a hash of their name, that pretraining leaves out."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def download(domain: str, cache: Path) -> Path:
    """Unpacks the domain's Debian packages below `cache` (no root needed) and returns the folder."""
    target = cache / domain
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES[domain]], cwd=cache, check=True)
        partial = cache / f"{domain}.partial"
        for package in PACKAGES[domain]:
            for archive in cache.glob(f"{package}_*.deb"):
                partial.mkdir(exist_ok=True)
                subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
        partial.rename(target)
    return target


def load_domain(domain: str, cache: Path) -> dict[str, str]:
    """Returns `{document name: text}` of one domain, in a fixed order."""
    if domain == "python":
        return dict(_python_files())
    folder = download(domain, cache)
    return dict(_bible_chapters(folder) if domain == "scripture" else _manual_pages(folder))


def roff_to_text(source: str) -> str:
    """Plain text of a manual page: section heads, paragraphs and tagged items, without the markup."""
    lines: list[str] = []
    for line in source.splitlines():
        if line.startswith(("'\\\"", '.\\"', ".TH", ".ig", ".de", ".if", ".ie", ".el", ".nr", ".ds", "..", ".so")):
            continue
        request = re.match(r"[.'](\w+)\s*(.*)", line)
        if request is None:
            if not line.startswith((".", "'")):
                lines.append(_plain(line))
            continue
        name, arguments = request.groups()
        words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', arguments)
        text = _plain(("" if name in ("BR", "RB", "IR", "RI", "BI", "IB") else " ").join(a or b for a, b in words))
        if name in ("SH", "SS"):
            lines.append(f"\n{text}")
        elif name in ("B", "I", "BR", "RB", "IR", "RI", "BI", "IB"):
            lines.append(text)
        elif name in ("PP", "P", "LP", "TP", "IP", "HP", "sp"):
            lines.append("")
            if name == "IP" and text.strip():
                lines.append(text.split()[0])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _plain(text: str) -> str:
    text = re.sub(r"\\f(\(..|\[[^\]]*\]|.)", "", text)
    text = re.sub(r"\\s[-+]?\d", "", text)
    text = re.sub(r"\\\[(\w+)\]", lambda match: _SPECIAL.get("(" + match[1], ""), text)
    text = re.sub(r"\\(\(..)", lambda match: _SPECIAL.get(match[1], ""), text)
    return re.sub(r"\\(.)", lambda match: {"-": "-", "e": "\\", " ": " ", "~": " "}.get(match[1], ""), text)


def _manual_pages(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((folder / "usr/share/man").rglob("*.gz")):
        if path.is_symlink():
            continue
        text = roff_to_text(gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace"))
        if len(text) > 400 and "\ufffd" not in text:
            yield path.name.removesuffix(".gz"), text


def _bible_chapters(folder: Path) -> Iterator[tuple[str, str]]:
    """Chapters, printed by the package's own reader; a verse a line."""
    command = [folder / "usr/bin/bible", "-f", "-p", folder / "usr/lib", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        reference, _, verse = line.partition(" ")
        book_and_chapter = reference.partition(":")[0]
        if verse:
            chapters.setdefault(book_and_chapter, []).append(verse.strip())
    for name, verses in chapters.items():
        yield name, "\n".join(verses) + "\n"


def _python_files() -> Iterator[tuple[str, str]]:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if re.search(r"site-packages|/tests?/|^test/|idlelib|encodings|lib2to3|pydoc_data", name):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > 400:
            yield name, text
