"""Our docstrings in the words of griffe, and what they name as links."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            text = text.replace("\nSaved for backward:", "\n**Saved for backward:**")
            text = re.sub(r"`(torch_sigmoid\.\w+)`", r"[`\1`][\1]", text)
            # Which is the name of a module, too.
            obj.docstring.value = text.replace("[torch_sigmoid.sigmoid]", "[torch_sigmoid.sigmoid.sigmoid]")
