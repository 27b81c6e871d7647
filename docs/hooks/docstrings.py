"""Docstrings for the reference: names that share a description each get it, and the star of z* is no emphasis."""

import re

from griffe import Extension

# `  a, b: text`, with the lines that go on deeper.
_SHARED = re.compile(r"^(?P<indent> +)(?P<names>[\w*]+(?:, [\w*]+)+)(?P<text>: .*(?:\n(?P=indent) +\S.*)*)", re.M)


def _one_by_one(match):
    return "\n".join(match["indent"] + name + match["text"] for name in match["names"].split(", "))


class SharedDescriptions(Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = _SHARED.sub(_one_by_one, obj.docstring.value)
            obj.docstring.value = re.sub(r"(?<=\w)\*(?=[\s).,;])", r"\\*", text)
