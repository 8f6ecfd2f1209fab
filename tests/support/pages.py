"""Pages and fragments of HTML, read and checked."""

from __future__ import annotations

from html.parser import HTMLParser


VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a page holds and refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.headings, self.cells = [], [], [], [], []
        self.images, self.text, self.titles = 0, "", []
        self.feed(text)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes[name] for name in ("src", "srcset", "href") if name in attributes]
        self.titles += [attributes["title"]] if "title" in attributes else []
        if tag == "img":
            self.images += 1
            assert attributes["alt"]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h3":
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
