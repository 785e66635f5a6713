"""Reading pages as a browser would: balanced tags, texts, ids, and what would be loaded from elsewhere."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input", "wbr"}
"""Elements of HTML that have no end tag."""


class Page(HTMLParser):
    """A page, parsed; unbalanced tags fail at once.

    Args:
        text: the HTML.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.tags, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data if self.open[-1] != "small" else f"\n{data}"

    @property
    def text(self):
        """Everything that can be read on the page."""
        return " ".join(self.texts)

    def values(self, name):
        """The values of an attribute, in order."""
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    def named(self, tag):
        """The attributes of each element of a name, in order."""
        return [attributes for found, attributes in self.tags if found == tag]

    def check(self):
        """Ids are unique and all references meet one; nothing is loaded; every figure and table has a name."""
        ids = self.values("id")
        assert len(ids) == len(set(ids))
        styles = " ".join(value for name in ("style", "clip-path", "fill") for value in self.values(name))
        used = set(re.findall(r"url\(#([^)]+)\)", styles))
        used |= {value[1:] for tag, attributes in self.tags for value in [attributes.get("href", "")] if tag == "use"}
        assert used
        assert used <= set(ids)
        assert not self.named("script")
        assert not self.named("link")
        loaded = [*self.values("src"), *(found["href"] for found in self.named("image") + self.named("use"))]
        assert all(address.startswith(("data:image/png;base64,", "#")) for address in loaded)
        assert all(found["role"] == "img" and found["aria-label"] for found in self.named("svg"))
        assert len(self.named("caption")) == len(self.named("table"))
        assert all(found.get("scope") in {"col", "row", "colgroup"} for found in self.named("th"))
