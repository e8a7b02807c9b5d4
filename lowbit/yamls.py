"""YAML with the core schema of version 1.2, on top of PyYAML, which reads 1.1.

``010`` is ten, ``0o10`` eight, ``1e-3`` a number; ``yes``, ``no``, ``on``, ``off``, ``12:30`` and ``2024-01-01`` are
text, and so is ``1_000``. A key given twice is an error.
"""

import re
from typing import Any, ClassVar

from lowbit.errors import LowbitError
from lowbit.extras import extra

with extra("train", "reading YAML"):
    import yaml


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the words and numbers of YAML 1.2 (section 10.3) and the merge key of 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise LowbitError(
                    f"the key {key.value!r} stands twice, the second time in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def load(text: str, where: str) -> Any:
    """The value of a YAML text, which can only hold plain values.

    Args:
        text: one document.
        where: name of the text in errors.

    Raises:
        LowbitError: the text is not YAML, or has a key twice.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except LowbitError as error:
        raise LowbitError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LowbitError(f"{where} is not YAML ({reason})") from None
